"""One run on two processes, in every way that recipes/accelerate/ offers: the numbers of a single process.

Run as a script on two ranks, this file first makes steps on awkward batches, then trains.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import DistributedType
from safetensors.torch import load_file
from test_step import STEPS, batches_of, broken, records_of
from torch import Tensor
from two_ranks import end, kill, start

from grace.config import load_recipe
from grace.errors import UserError
from grace.export.pack import export_run
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.parallel import leave, make_accelerator
from grace.parallel_fsdp import FullySharded
from grace.parallel_zero import check_config
from grace.plan_modes import state_rows
from grace.resume_checkpoint import checkpoint_paths
from grace.run import set_up
from grace.step import NonFiniteLoss, forward_backward, run_teacher
from grace.student import Weights
from grace.train import train

ROOT = Path(__file__).parents[1]
RECIPE = "small_world/grace_w4.yaml"
MODES = ("ddp", "fsdp2", "zero2", "zero3", "zero3_offload")
TIMEOUT = 200  # of a launch that takes 15 s on two idle cores
CURVE = ("loss/total", "loss/ce", "loss/gdkd", "loss/rcka", "optim/grad_norm", "ib/beta")
# ZeRO-3 and its test need small parts: a whole tiny model would fit into what DeepSpeed never cuts up.
SMALL_PARTS = {
    "stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 100_000,
    "stage3_max_live_parameters": 300_000, "reduce_bucket_size": 200_000, "sub_group_size": 200_000,
}  # fmt: skip


def overrides(models: Path, world: Path, out: Path, *extra: str) -> list[str]:
    """A run of 20 steps whose beta moves, saved in its first half, validated on fewer records than ranks."""
    return [
        f"student.path={models / 'student'}",
        f"teacher.path={models / 'teacher'}",
        f"data.path={world / 'qat_train.json'}",
        f"data.validation_path={world / 'validation.json'}",
        f"run.output_dir={out}",
        *("optim.batch_size=7", "optim.lr=3e-5", "distill.tau=3.0", "run.max_steps=20"),
        *("run.micro_batch_size=2", "run.log_every=1", "run.save_every=8", "run.keep_last=9"),
        *("run.eval_every=10", "run.eval_records=1"),
        *extra,
    ]


# ---------------------------------------------------------------- what each process does


def awkward_steps(models: Path, world: Path, out: Path) -> tuple[dict[str, Any], Any]:
    """Two rounds over the steps of `STEPS`, optimizer and controller included, with recomputed activations."""
    recipe = load_recipe(RECIPE, overrides(models, world, out, "run.gradient_checkpointing=true"))
    accelerator = make_accelerator()
    processor = load_processor(recipe.student.path)
    run = set_up(recipe, accelerator, processor.tokenizer, 1)
    assert run.teacher is not None
    rank, ranks = accelerator.process_index, accelerator.num_processes
    head_VE = qwen3vl.head_weight(run.teacher)

    def losses(batches: list[Any]) -> Any:
        signals = run_teacher(run.teacher, batches, run.objective.vocabulary)  # type: ignore[arg-type]
        weights = Weights(run.controller.beta, 3.0)
        return forward_backward(run.parallel, batches, signals, weights, "gdkd", head_VE)

    told: dict[str, Any] = {"steps": {}}
    for round_number in (1, 2):
        for name, (kinds, micro) in STEPS.items():
            result = losses(batches_of(records_of(kinds, world), processor, micro, rank, ranks))
            run.controller.update(result.kd)
            told["steps"][f"{name} {round_number}"] = {**asdict(result), "norm": run.parallel.update()}
    told["controller"] = run.controller.state_dict()
    (batch,) = batches_of(records_of("i" * ranks, world), processor, 1, rank, ranks)
    assert batch is not None
    try:
        losses([broken(batch) if rank == ranks - 1 else batch])
    except NonFiniteLoss as error:
        told["stopped"] = str(error)
    return told, run


def is_cut_up(mode: str, run: Any) -> bool:
    """Whether the student lies in the processes as the mode says."""
    kind = run.accelerator.distributed_type
    weight: Any = qwen3vl.quantized_linears(run.model)["model.language_model.layers.0.mlp.up_proj"].weight
    parts = {name: type(part).__name__ for name, part in vars(run.parallel).items()}
    if mode == "ddp":
        return kind == DistributedType.MULTI_CPU and parts["student"] == "DistributedDataParallel"
    if mode == "fsdp2":
        return weight.to_local().shape[0] * 2 == weight.shape[0]
    halves = sum(part.numel() for part in run.parallel.flat_parts()) * 2
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in run.parallel.trainable().values())
    return (
        kind == DistributedType.DEEPSPEED
        and whole <= halves <= 1.01 * whole
        and (weight.numel() == 0) == mode.startswith("zero3")
        and run.parallel.stage == int(mode[4])
    )


def held(run: Any) -> int:
    """Bytes of weights and optimizer state that lie in this process between steps."""
    tensors = [getattr(p, "ds_tensor", p) for p in run.model.parameters()]
    tensors += run.parallel.flat_parts() if hasattr(run.parallel, "flat_parts") else []
    tensors += [value for one in run.parallel.optimizer.state.values() for value in one.values()]
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in local}.values())


def planned(mode: str, run: Any) -> int:
    """The same as the plan has it."""
    sizes = {name: getattr(p, "ds_numel", p.numel()) for name, p in run.model.named_parameters()}
    trained = {name for name, p in run.model.named_parameters() if p.requires_grad}
    scales = sum(size for name, size in sizes.items() if name.endswith(".theta"))
    learned = sum(sizes[name] for name in trained)
    device, host = state_rows(mode, qwen3vl.skeleton(run.base_config), learned - scales, scales, 2)
    lasting = ("student weights", "theta", "Adam moments", "optimizer's copy")
    return sum(size for name, size, _ in device + host if name in lasting)


def one_rank(mode: str, models: Path, world: Path, out: Path) -> None:
    told, run = awkward_steps(models, world, out)
    told["memory"] = held(run), planned(mode, run)
    assert run.accelerator.num_processes == 2 and is_cut_up(mode, run)
    (out / f"awkward-{run.accelerator.process_index}.json").write_text(json.dumps(told))
    del run
    asked = {name: value for name, value in os.environ.items() if name.startswith(("ACCELERATE_", "FSDP_"))}
    (out / "launcher.json").write_text(json.dumps(asked))
    train(load_recipe(RECIPE, overrides(models, world, out / "run")))


# ---------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def models(tiny_student_dir: Path, tiny_teacher_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    (folder / "student").symlink_to(tiny_student_dir)
    (folder / "teacher").symlink_to(tiny_teacher_dir)
    return folder


@pytest.fixture(scope="module")
def single(models: Path, tiny_world_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One process: `awkward-0.json`, `run/` and its export `awq/`."""
    out = tmp_path_factory.mktemp("single")
    told, _ = awkward_steps(models, tiny_world_dir, out)
    (out / "awkward-0.json").write_text(json.dumps(told))
    train(load_recipe(RECIPE, overrides(models, tiny_world_dir, out / "run")))
    export_run(out / "run", out / "awq")
    return out


def launcher(mode: str, folder: Path) -> list[str]:
    """`accelerate launch` with the recipe of a mode on two processes; ZeRO-3 with small parts."""
    path = ROOT / "recipes" / "accelerate" / f"{mode}.yaml"
    if mode.startswith("zero3"):
        config = yaml.safe_load(path.read_text())
        given = config["deepspeed_config"]
        zero: dict[str, Any] = {"stage": given["zero_stage"], **SMALL_PARTS}
        for part in ("optimizer", "param"):
            zero[f"offload_{part}"] = {"device": given[f"offload_{part}_device"]}
        (folder / "zero.json").write_text(
            json.dumps({"train_micro_batch_size_per_gpu": "auto", "zero_optimization": zero})
        )
        config["deepspeed_config"] = {"deepspeed_config_file": str(folder / "zero.json")}
        del config["mixed_precision"]
        path = folder / f"{mode}.yaml"
        path.write_text(yaml.safe_dump(config))
    return ["accelerate.commands.launch", "--config_file", str(path), *TWO]


TWO = ["--num_processes", "2", "--main_process_port", "0"]


@pytest.fixture(scope="module", params=MODES)
def killed(
    request: pytest.FixtureRequest,
    models: Path,
    tiny_world_dir: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """Two processes, killed after their first checkpoint and started again; `awkward-RANK.json` and `run/`.

    ZeRO-3 with offload goes straight to its end: its checkpoints are those of ZeRO-3.
    """
    mode = request.param
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    out = tmp_path_factory.mktemp(mode)
    how, run_dir = launcher(mode, out), out / "run"
    process = start([__file__, mode, str(models), str(tiny_world_dir), str(out)], out / "log", how)
    if mode == "zero3_offload":
        end(process, out / "log", TIMEOUT)
        return out
    deadline = time.monotonic() + TIMEOUT
    while not checkpoint_paths(run_dir) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    kill(process)
    assert len(checkpoint_paths(run_dir)) == 1, (out / "log").read_text()[-5000:]
    arguments = overrides(models, tiny_world_dir, run_dir)
    # What `accelerate launch` asked for, without its detour: it takes as long to start as the ranks themselves.
    environment = json.loads((out / "launcher.json").read_text())
    again = start(["-m", "grace.train", RECIPE, *arguments], out / "log", environment=environment)
    end(again, out / "log", TIMEOUT)
    assert "continuing from step 8" in (out / "log").read_text()
    return out


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def curve(run_dir: Path) -> Tensor:
    rows = [[line[name] for name in CURVE] for line in metrics(run_dir) if "loss/total" in line]
    return torch.tensor(rows, dtype=torch.float64)


# ---------------------------------------------------------------- tests


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"zero_optimization": {"stage": 1}}, "stage 1 is not supported"),
        ({"zero_optimization": {}}, "stage None is not supported"),
        ({"bf16": {"enabled": True}}, "run.precision"),
        ({"fp16": {"enabled": True}}, "run.precision"),
        ({"optimizer": {"type": "Adam"}}, "the recipe's"),
    ],
)
def test_deepspeed_settings_that_would_train_something_else_are_refused(change: dict, told: str) -> None:
    good = {"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}}
    assert check_config(good) == 2
    with pytest.raises(UserError, match=told):
        check_config(good | change)


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"FSDP_VERSION": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "zero3_offload.yaml"),
    ],
)
def test_fsdp_settings_that_are_not_there_are_refused(monkeypatch, variables: dict, told: str) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    student = torch.nn.ModuleDict({"model": torch.nn.Linear(1, 1)})
    student.model = student["model"]
    with pytest.raises(UserError, match=told):
        FullySharded(Accelerator(), student, lambda _: None, 1.0)  # type: ignore[arg-type, return-value]


def test_missing_deepspeed_is_one_line(monkeypatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"pip install 'grace\[deepspeed\]'"):
        make_accelerator()


LEAVING = """
import atexit, sys, threading, time, torch
from grace.parallel import leave

class Kept:
    def __del__(self):
        print("interpreter taken down")

kept = Kept()
if "group" in sys.argv:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
atexit.register(print, "exit handlers")
threading.Thread(target=lambda: (time.sleep(0.3), print("thread's end"))).start()
leave(7)
"""


@pytest.mark.parametrize(
    ("group", "end"), [("group", []), ("alone", ["interpreter taken down"])], ids=["group", "alone"]
)
def test_leaving_does_all_but_take_the_interpreter_down_under_gloo(group: str, end: list[str]) -> None:
    left = subprocess.run([sys.executable, "-c", LEAVING, group], capture_output=True, text=True, timeout=100)
    assert left.returncode == 7, left.stderr
    assert left.stdout.splitlines() == ["thread's end", "exit handlers", *end]


@pytest.mark.slow
def test_awkward_batches_hang_nothing_and_count_right(single: Path, killed: Path) -> None:
    one, first, second = (
        json.loads((out / f"awkward-{rank}.json").read_text())
        for out, rank in ((single, 0), (killed, 0), (killed, 1))
    )
    assert first["steps"] == second["steps"] and first["controller"] == second["controller"]
    for there, expected in (first["memory"], second["memory"]):
        assert there == pytest.approx(expected, rel=0.05)
    for name, values in one["steps"].items():
        other = first["steps"][name]
        assert other.pop("counts") == pytest.approx(values.pop("counts"), rel=1e-6)
        assert other.pop("gates") == pytest.approx(values.pop("gates"), rel=1e-5)
        seen, also_seen = (  # an image may fall on the other side of a bin's edge
            {k: v for k, v in told.pop("images").items() if k != "rcka/cka_histogram"}
            for told in (values, other)
        )
        assert also_seen == pytest.approx(seen, rel=1e-5) and other.pop("work") == values.pop("work")
        assert first["steps"][name] == pytest.approx(values, rel=1e-5, abs=1e-9), name
    assert first["controller"] == pytest.approx(one["controller"], rel=1e-5)
    assert all("not finite" in told["stopped"] for told in (first, second))
    assert "qat_train" in second["stopped"] and "qat_train" not in first["stopped"]


@pytest.mark.slow
def test_killed_and_resumed_it_is_the_run_of_one_process(single: Path, killed: Path) -> None:
    reference, numbers = curve(single / "run"), curve(killed / "run")
    assert reference.shape == numbers.shape == (20, len(CURVE))
    flips = edge_flips(single / "run" / "model", killed / "run" / "model")
    print(f"{killed.name}: {flips} codes or scales differ, each on the edge of a rounding")
    # One code more or less is a change of the model: the curves may then part a little.
    tolerance = 1e-5 if flips == 0 else 1e-3
    assert torch.allclose(numbers, reference, rtol=tolerance, atol=0.0), (
        (numbers / reference - 1).abs().amax(1)
    )
    ends = [metrics(out / "run")[-1] for out in (single, killed)]
    assert "val/ce" in ends[0] and ends[1] == pytest.approx(ends[0], rel=tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("killed", ["zero3"], indirect=True)
def test_one_process_goes_on_where_two_stopped(
    single, killed, models, tiny_world_dir, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(killed / "run", run_dir)
    shutil.rmtree(run_dir / "model")
    for path in checkpoint_paths(run_dir)[1:]:
        shutil.rmtree(path)
    recipe = (run_dir / "recipe.yaml").read_text()
    (run_dir / "recipe.yaml").write_text(recipe.replace(str(killed / "run"), str(run_dir)))
    train(load_recipe(RECIPE, overrides(models, tiny_world_dir, run_dir)))
    tolerance = 1e-5 if edge_flips(single / "run" / "model", run_dir / "model") == 0 else 1e-3
    assert torch.allclose(curve(run_dir), curve(single / "run"), rtol=tolerance, atol=0.0)


def edge_flips(one: Path, two: Path) -> int:
    """Codes and scales that differ between two models; each must have come from the edge of a rounding."""
    a, b = (load_file(path / "grace_qat" / "state.safetensors") for path in (one, two))
    flips = 0
    for name in (key.removesuffix(".codes") for key in a if key.endswith(".codes")):
        scales = a[f"{name}.scales"].double(), b[f"{name}.scales"].double()
        turned_OG = scales[0] != scales[1]
        exact_OG = a[f"{name}.theta"].double().exp()
        edge_OG = (scales[0] + scales[1]) / 2
        assert ((exact_OG - edge_OG).abs() <= 1e-5 * edge_OG)[turned_OG].all(), name
        size = a[f"{name}.latent"].shape[1] // turned_OG.shape[1]
        same_OI = ~turned_OG.repeat_interleave(size, 1)
        codes = a[f"{name}.codes"].double(), b[f"{name}.codes"].double()
        flipped_OI = (codes[0] != codes[1]) & same_OI
        edge_OI = (codes[0] + codes[1]) / 2 * scales[0].repeat_interleave(size, 1)
        assert ((a[f"{name}.latent"].double() - edge_OI).abs() <= 1e-6)[flipped_OI].all(), name
        flips += int(turned_OG.sum()) + int(flipped_OI.sum())
    return flips


@pytest.mark.slow
def test_exported_codes_are_those_of_one_process(single: Path, killed: Path, tmp_path: Path) -> None:
    export_run(killed / "run", tmp_path / "awq")
    one, two = (load_file(path / "model.safetensors") for path in (single / "awq", tmp_path / "awq"))
    assert one.keys() == two.keys()
    packed = [name for name in one if name.endswith(".qweight")]
    assert len(packed) == 28
    differing = sum(
        int((((one[name] ^ two[name]) >> shift) & 15).ne(0).sum())
        for name in packed
        for shift in range(0, 32, 4)
    )
    print(f"{killed.name}: {differing} exported codes differ")
    if edge_flips(single / "run" / "model", killed / "run" / "model") == 0:
        assert differing == 0


if __name__ == "__main__":
    one_rank(sys.argv[1], *(Path(argument) for argument in sys.argv[2:]))
    leave(0)
