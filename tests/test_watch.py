"""What a run's log holds beside its losses, taken from a real one, and against its own checkpoint."""

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from grace import run_info
from grace.config import load_recipe
from grace.quant.grid import quantize
from grace.resume_checkpoint import checkpoint_paths
from grace.run_files import ENVIRONMENT_FILE
from grace.train import train
from grace.watch import controller_values, finite, short

DISTILLED = {
    "gate/mean", "gate/histogram", "teacher/entropy", "ib/beta", "ib/ema", "ib/m_minus_tau", "rcka/cka_mean",
    "rcka/cka_min", "rcka/cka_max", "rcka/cka_histogram", "rcka/degenerate_images", "loss/gdkd", "loss/rcka",
}  # fmt: skip
QUANTIZED = {
    f"quant/{name}" for name in ("snr_db", "snr_db_min", "snr_db_max", "clipped", "flipped", "scale_drift")
}
ALWAYS = {
    "step", "loss/total", "loss/ce", "optim/lr", "optim/grad_norm", "grad_norm/matrices", "grad_norm/vectors",
    "data/padding_share", "tokens_per_s", "perf/images_per_s", "perf/input_tokens_per_s", "perf/records_per_s",
    "perf/flops_per_s", "perf/data_wait", "perf/mfu", "perf/host_memory_gib",
}  # fmt: skip


@pytest.fixture(scope="module")
def arguments(tiny_world_dir, tiny_student_dir, tiny_teacher_dir):
    def make(out: Path, *extra: str) -> list[str]:
        return [
            f"run.output_dir={out}",
            f"data.path={tiny_world_dir / 'qat_train.json'}",
            f"data.validation_path={tiny_world_dir / 'validation.json'}",
            f"student.path={tiny_student_dir}",
            f"teacher.path={tiny_teacher_dir}",
            "optim.batch_size=8", "run.max_steps=4", "run.log_every=2", "run.save_every=2", "run.eval_records=4",
            "distill.tau_warmup_steps=3", *extra,
        ]  # fmt: skip

    return make


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory, arguments):
    """A finished run of four steps, with a log line every two."""
    out = tmp_path_factory.mktemp("watch") / "run"
    train(load_recipe("small_world/grace_w4.yaml", arguments(out)))
    return out


def logged(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def test_every_window_tells_everything(run_dir):
    lines = [line for line in logged(run_dir) if "loss/total" in line]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        expected = ALWAYS | DISTILLED | QUANTIZED | {"rcka/omega", "grad_norm/scales"}
        assert set(line) - set(layers_of(line)) == expected
        assert sum(line["gate/histogram"]) == pytest.approx(1) == sum(line["rcka/cka_histogram"])
        assert line["rcka/cka_min"] <= line["rcka/cka_mean"] <= line["rcka/cka_max"] <= 1
        assert 0 <= line["perf/data_wait"] < 1 and line["perf/images_per_s"] > 0
    assert lines[0]["ib/m_minus_tau"] is None and isinstance(lines[1]["ib/m_minus_tau"], float)


def test_quantizer_is_measured_as_the_checkpoints_have_it(run_dir):
    """Flips between the steps logged are those between the latents and scales saved there."""
    flipped = weights = 0
    first, second = (load_file(path / "trainable.safetensors") for path in checkpoint_paths(run_dir))
    for name in first:
        if name.endswith(".theta"):
            weight = name.replace(".theta", ".weight")
            one, two = (quantize(state[weight], state[name])[0] for state in (first, second))
            flipped, weights = flipped + int((one != two).sum()), weights + one.numel()
    (line,) = (line for line in logged(run_dir) if line["step"] == 4 and "loss/total" in line)
    assert line["quant/flipped"] == pytest.approx(flipped / weights, rel=1e-9) and flipped > 0


def layers_of(line: dict) -> dict[str, float]:
    return {key: value for key, value in line.items() if key.startswith("quant/snr/")}


def test_layers_are_told_at_the_end(run_dir):
    first, last = (line for line in logged(run_dir) if "loss/total" in line)
    ratios = layers_of(last).values()
    assert layers_of(first) == {} and "quant/snr/layers.0.mlp.up_proj" in layers_of(last)
    assert min(ratios) == last["quant/snr_db_min"] and max(ratios) == last["quant/snr_db_max"]


def test_layers_are_told_once_per_validation(tmp_path, arguments):
    extra = ("run.max_steps=8", "run.log_every=2", "run.eval_every=3", "run.save_every=100")
    train(load_recipe("small_world/grace_w4.yaml", arguments(tmp_path / "run", *extra)))
    told = [line["step"] for line in logged(tmp_path / "run") if layers_of(line)]
    assert told == [4, 6, 8]  # validated after 3, 6 and 8


def test_gradients_of_the_groups_make_up_the_whole(run_dir, tmp_path, arguments):
    train(
        load_recipe(
            "small_world/grace_w4.yaml", arguments(tmp_path / "run", "run.log_every=1", "run.max_steps=1")
        )
    )
    line = logged(tmp_path / "run")[0]
    parts = [line[f"grad_norm/{name}"] ** 2 for name in ("matrices", "vectors", "scales")]
    assert sum(parts) ** 0.5 == pytest.approx(line["optim/grad_norm"], rel=1e-5)


def test_run_without_teacher_and_quantizer_tells_the_rest(tmp_path, arguments):
    extra = [a for a in arguments(tmp_path / "run") if not a.startswith(("teacher", "distill"))]
    train(load_recipe("small_world/student_control.yaml", extra))
    line = next(line for line in logged(tmp_path / "run") if "loss/total" in line)
    assert set(line) == ALWAYS
    assert not any(key.startswith("quant/") for line in logged(tmp_path / "run") for key in line)


def test_watching_changes_no_number(run_dir, tmp_path, arguments):
    """Measured at every step or twice, the same weights come out."""
    train(load_recipe("small_world/grace_w4.yaml", arguments(tmp_path / "run", "run.log_every=1")))
    one, two = (load_file(path / "model" / "model.safetensors") for path in (run_dir, tmp_path / "run"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_environment_is_written(run_dir):
    known = json.loads((run_dir / ENVIRONMENT_FILE).read_text())
    assert (known["processes"], known["device"], known["total_steps"]) == (1, "cpu", 4)
    assert known["torch"] == torch.__version__ and known["git_revision"] == run_info.git_revision()


def test_revision_says_whether_files_were_changed(tmp_path):
    def git(*words: str) -> None:
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *words],
            check=True,
            capture_output=True,
        )

    assert run_info.git_revision(tmp_path) is None
    git("init")
    (tmp_path / "file").write_text("1")
    git("add", ".")
    git("commit", "-m", "one")
    clean = run_info.git_revision(tmp_path)
    assert clean is not None and len(clean) == 40
    (tmp_path / "file").write_text("2")
    assert run_info.git_revision(tmp_path) == f"{clean}-dirty"


def test_every_name_is_documented():
    """`recipes/METRICS.md` names what a run logs, and nothing else."""
    text = (Path(__file__).parents[1] / "recipes" / "METRICS.md").read_text()
    cells = [line.split("|")[1] for line in text.splitlines() if line.startswith("| `")]
    named = [name for cell in cells for name in re.findall("`([^`]+)`", cell)]
    rest = {"rcka/omega", "grad_norm/scales", "quant/snr/LAYER", "perf/device_memory_gib"}
    validated = {"val/ce", "val/exact_match", "val/exact_match_se", "val/turns", "eval/TASK"}
    assert sorted(named) == sorted(ALWAYS | DISTILLED | QUANTIZED | rest | validated)


def test_small_things():
    assert short("model.somewhere.layers.11.mlp.up_proj") == "layers.11.mlp.up_proj"
    assert finite(1.5) == 1.5 and finite(float("inf")) is None

    class Controller:
        m, tau = 2.0, 1.5

    assert controller_values(Controller()) == {"ib/m_minus_tau": 0.5}  # type: ignore[arg-type]
