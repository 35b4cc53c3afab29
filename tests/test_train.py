"""Training from outside: cut-independence, resume to the bit, kills, refusals."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file, save_file

from grace.checkpoint import read_qat
from grace.config import load_recipe
from grace.errors import UserError
from grace.quant.grid import dequantize, quantize
from grace.resume_checkpoint import checkpoint_paths
from grace.run import total_steps
from grace.schedule import learning_rate_factor
from grace.tracking import is_timing
from grace.train import main, train


@pytest.fixture
def overrides(tiny_world_dir, tiny_student_dir, tiny_teacher_dir):
    """Overrides that make the small-world GRACE recipe a run of a few seconds."""

    def make(out: Path, *extra: str) -> list[str]:
        return [
            f"run.output_dir={out}",
            f"data.path={tiny_world_dir / 'qat_train.json'}",
            f"data.validation_path={tiny_world_dir / 'validation.json'}",
            f"student.path={tiny_student_dir}",
            f"teacher.path={tiny_teacher_dir}",
            "optim.batch_size=8",
            "run.max_steps=6",
            "run.micro_batch_size=8",
            "run.log_every=1",
            "run.save_every=2",
            "run.eval_records=8",
            *extra,
        ]

    return make


RECIPE = "small_world/grace_w4.yaml"


def metrics(run_dir: Path) -> list[dict]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[float]:
    return [
        m[key]
        for m in metrics(run_dir)
        if "loss/total" in m
        for key in ("loss/total", "loss/gdkd", "loss/rcka")
    ]


def test_numbers_do_not_depend_on_how_the_batch_is_cut(tmp_path, overrides):
    for name, extra in {
        "whole": [],
        "quarters": ["run.micro_batch_size=2"],
        "odd": ["run.micro_batch_size=3", "teacher.micro_batch_size=5"],
    }.items():
        train(load_recipe(RECIPE, overrides(tmp_path / name, "run.max_steps=3", *extra)))
    for name in ("quarters", "odd"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "whole"), rel=1e-5)


def test_teacher_may_move_between_the_halves_of_a_run(tmp_path, overrides):
    """On a CPU it moves to where it is: what is tested is that it is placed, and that a run may go on so."""
    train(load_recipe(RECIPE, overrides(tmp_path / "plain")))
    train(load_recipe(RECIPE, overrides(tmp_path / "moved")))
    (tmp_path / "moved" / "model").rename(tmp_path / "first_model")
    shutil.rmtree(checkpoint_paths(tmp_path / "moved")[-1])
    train(load_recipe(RECIPE, overrides(tmp_path / "moved", "teacher.device=cpu")))
    same_end(tmp_path / "plain", tmp_path / "moved")


@pytest.mark.parametrize("load_in", ["8bit", "4bit"])
def test_teacher_of_few_bits(tmp_path, overrides, load_in):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    train(load_recipe(RECIPE, overrides(tmp_path / "plain", "run.max_steps=2")))
    train(load_recipe(RECIPE, overrides(tmp_path / "few", "run.max_steps=2", f"teacher.load_in={load_in}")))
    plain, few = losses(tmp_path / "plain"), losses(tmp_path / "few")
    assert few != plain and few == pytest.approx(plain, rel=0.3)
    with pytest.raises(UserError, match=r"teacher\.load_in"):  # another teacher, another run
        train(load_recipe(RECIPE, overrides(tmp_path / "few", "run.max_steps=2")))


@pytest.mark.parametrize("device", ["cuda:99", "cuda:+99"])
def test_teacher_where_no_device_is(tmp_path, overrides, device, capfd):
    assert main([RECIPE, *overrides(tmp_path / "run", f"teacher.device={device}")]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"error: teacher.device={device} ")


def test_checkpointed_activations_give_the_same_numbers(tmp_path, overrides):
    train(load_recipe(RECIPE, overrides(tmp_path / "plain", "run.max_steps=2")))
    train(
        load_recipe(
            RECIPE, overrides(tmp_path / "ckpt", "run.max_steps=2", "run.gradient_checkpointing=true")
        )
    )
    assert losses(tmp_path / "ckpt") == pytest.approx(losses(tmp_path / "plain"), rel=1e-5)


def test_bfloat16_compute_is_close_to_float32(tmp_path, overrides):
    for precision in ("bf16", "fp32"):  # fp32 last: the library keeps one precision for a whole process
        AcceleratorState._reset_state()
        arguments = overrides(tmp_path / precision, "run.max_steps=3", f"run.precision={precision}")
        train(load_recipe(RECIPE, arguments))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)


def test_final_model_is_what_was_trained(tmp_path, overrides):
    model_dir = train(load_recipe(RECIPE, overrides(tmp_path / "run")))
    state, weights = read_qat(model_dir, latents=True), load_file(model_dir / "model.safetensors")
    assert len(state.modules) == len(state.info["modules"]) > 0
    for name, weight in state.modules.items():
        codes_OI, scales_OG = quantize(weight.latent_OI, weight.theta_OG, state.group_size, state.bits)
        assert torch.equal(codes_OI, weight.codes_OI)
        assert torch.equal(scales_OG, weight.scales_OG)
        assert torch.equal(weights[f"{name}.weight"], dequantize(codes_OI, scales_OG, state.group_size))
    assert {"val/ce", "val/exact_match"} <= set(metrics(tmp_path / "run")[-1])
    assert state.info["metrics"]["val/ce"] > 0


def same_end(first: Path, second: Path) -> None:
    """Both runs logged the same numbers and ended with the same weights, bit for bit."""
    strip = [
        [{k: v for k, v in m.items() if not is_timing(k)} for m in metrics(path)] for path in (first, second)
    ]
    assert strip[0] == strip[1]
    one, two = (load_file(path / "model" / "grace_qat" / "state.safetensors") for path in (first, second))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)


def launch(recipe: str, arguments: list[str], log: Path) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with log.open("w") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "grace.train", recipe, *arguments],
            env=environment,
            stdout=file,
            stderr=file,
        )


@pytest.mark.slow
@pytest.mark.parametrize("progress", ["first checkpoint", "second checkpoint", "during a save"])
def test_killed_run_continues_to_the_same_end(tmp_path, overrides, progress):
    arguments = ["run.max_steps=12", "run.log_every=3", "run.save_every=2"]
    straight = launch(RECIPE, overrides(tmp_path / "straight", *arguments), tmp_path / "straight.log")
    assert straight.wait(timeout=300) == 0, (tmp_path / "straight.log").read_text()
    killed_dir = tmp_path / "killed"
    process = launch(RECIPE, overrides(killed_dir, *arguments), tmp_path / "killed.log")

    def reached() -> bool:
        if progress == "during a save":
            return any(killed_dir.glob("checkpoints/.step-*"))
        return len(checkpoint_paths(killed_dir)) >= (1 if progress == "first checkpoint" else 2)

    deadline = time.time() + 120
    while not reached() and process.poll() is None and time.time() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    again = launch(RECIPE, overrides(killed_dir, *arguments), tmp_path / "again.log")
    assert again.wait(timeout=300) == 0, (tmp_path / "again.log").read_text()
    same_end(tmp_path / "straight", killed_dir)


def test_damaged_newest_checkpoint_is_named_and_passed_over(tmp_path, overrides, capfd):
    run_dir = tmp_path / "run"
    train(load_recipe(RECIPE, overrides(run_dir)))
    newest = checkpoint_paths(run_dir)[-1] / "trainable.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    (run_dir / "model").rename(tmp_path / "first_model")
    train(load_recipe(RECIPE, overrides(run_dir)))
    told = capfd.readouterr().err
    assert "step-000006" in told and "damaged" in told and "continuing from step 4" in told
    one, two = (
        load_file(p / "grace_qat" / "state.safetensors")
        for p in (tmp_path / "first_model", run_dir / "model")
    )
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_leftovers_of_a_kill_are_removed(tmp_path, overrides):
    run_dir = tmp_path / "run"
    train(load_recipe(RECIPE, overrides(run_dir, "run.max_steps=1")))
    for name in (".model.tmp-abc", "checkpoints/.step-000002.tmp-abc"):
        (run_dir / name).mkdir()
        (run_dir / name / "half").write_text("")
    (run_dir / ".recipe.yaml.tmp-abc").write_text("half")
    train(load_recipe(RECIPE, overrides(run_dir, "run.max_steps=1")))
    assert not list(run_dir.rglob("*tmp-*"))


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_picture_is_one_line_and_exit_code_2(tmp_path, overrides, tiny_world_dir, workers, capfd):
    shutil.copytree(tiny_world_dir, tmp_path / "world")
    pictures = sorted((tmp_path / "world" / "images" / "qat_train").iterdir())
    for picture in pictures:
        picture.write_bytes(picture.read_bytes()[:500])
    arguments = overrides(tmp_path / "run", f"data.num_workers={workers}")
    assert main([RECIPE, *arguments, f"data.path={tmp_path / 'world' / 'qat_train.json'}"]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("error: record qat_train-") and "replace it or drop the record" in line


def test_finished_run_is_left_alone(tmp_path, overrides, capfd):
    recipe = load_recipe(RECIPE, overrides(tmp_path / "run", "run.max_steps=1"))
    train(recipe)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    train(recipe)
    assert "is finished" in capfd.readouterr().err
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_output_directory_of_another_recipe_is_refused(tmp_path, overrides):
    train(load_recipe(RECIPE, overrides(tmp_path / "run", "run.max_steps=1")))
    with pytest.raises(UserError, match="optim.lr"):
        train(load_recipe(RECIPE, overrides(tmp_path / "run", "run.max_steps=1", "optim.lr=0.5")))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("do not touch")
    with pytest.raises(UserError, match="not a run"):
        train(load_recipe(RECIPE, overrides(tmp_path / "mine")))


def test_mistake_before_the_first_checkpoint_can_be_corrected(tmp_path, overrides):
    with pytest.raises(UserError, match="does not exist"):
        train(load_recipe(RECIPE, overrides(tmp_path / "run", "data.path=nowhere.json")))
    with pytest.raises(UserError, match="more than data.max_length=8"):
        train(load_recipe(RECIPE, overrides(tmp_path / "run", "data.max_length=8")))
    train(load_recipe(RECIPE, overrides(tmp_path / "run", "run.max_steps=1")))
    assert load_recipe(tmp_path / "run" / "recipe.yaml").data.max_length > 8


def test_output_directory_of_a_live_run_is_refused(tmp_path, overrides):
    import fcntl

    (tmp_path / "run").mkdir()
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use"):
            train(load_recipe(RECIPE, overrides(tmp_path / "run")))


def test_non_finite_loss_stops_before_the_step_and_names_the_records(tmp_path, overrides, tiny_student_dir):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_student_dir, broken)
    weights = load_file(broken / "model.safetensors")
    weights["model.language_model.norm.weight"][:] = float("inf")
    save_file(weights, broken / "model.safetensors", metadata={"format": "pt"})
    arguments = overrides(tmp_path / "run", f"student.path={broken}", "run.save_every=1")
    with pytest.raises(RuntimeError, match="qat_train-"):
        train(load_recipe(RECIPE, arguments))
    assert checkpoint_paths(tmp_path / "run") == []


def test_full_precision_run_without_teacher_ends_in_a_plain_model(tmp_path, overrides):
    arguments = [a for a in overrides(tmp_path / "run", "run.max_steps=2") if not a.startswith("teacher")]
    model_dir = train(load_recipe("small_world/student_control.yaml", arguments))
    assert (model_dir / "model.safetensors").is_file() and not (model_dir / "grace_qat").exists()


def test_schedule():
    assert learning_rate_factor(0, 100, 0.03, "cosine") == pytest.approx(1 / 3)
    assert learning_rate_factor(3, 100, 0.03, "cosine") == 1.0
    assert learning_rate_factor(99, 100, 0.03, "cosine") < 1e-3
    assert learning_rate_factor(99, 100, 0.0, "constant") == 1.0


def test_steps_follow_from_epochs(overrides, tmp_path):
    recipe = load_recipe(
        RECIPE,
        [a for a in overrides(tmp_path, "optim.epochs=2") if "max_steps" not in a] + ["run.max_steps=null"],
    )
    assert total_steps(recipe, 20) == 5
