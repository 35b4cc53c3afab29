"""Benchmarks in training: asked where a run validates, shared out over processes, without touching its numbers."""

import json
from pathlib import Path

import pytest
from benchmark_fixtures import ROWS, write

from grace.config import load_recipe
from grace.errors import UserError
from grace.evaluation.quick_tasks import QuickTasks
from grace.models import qwen3vl
from grace.models.processor import load_processor
from grace.train import train


def trained(out: Path, student: Path, world: Path, *extra: str) -> list[dict]:
    """The log of three steps of quantized training."""
    overrides = [
        f"run.output_dir={out}", f"data.path={world / 'qat_train.json'}", f"student.path={student}", "optim.batch_size=4",
        "run.max_steps=3", "run.micro_batch_size=4", "run.log_every=1", "run.save_every=3", "data.validation_path=null", *extra,
    ]  # fmt: skip
    train(load_recipe("small_world/qat_w4.yaml", overrides))
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_scores_are_logged_where_a_run_validates(precision, tmp_path, tiny_student_dir, tiny_world_dir):
    """The tiny student is random: its scores are 0, on lines of their own, and nothing else of the log changes."""
    tasks = ["run.eval_tasks=small_world,ai2d", "run.eval_limit=3", "run.eval_every=2"]
    data = f"run.eval_data=small_world={tiny_world_dir / 'test.json'},ai2d={write(ROWS['ai2d'](), tmp_path / 'ai2d.parquet')}"
    arguments = (tiny_student_dir, tiny_world_dir, f"run.precision={precision}")
    log = trained(tmp_path / "with", *arguments, *tasks, data)
    found = [line for line in log if "eval/small_world" in line]
    assert [line["step"] for line in found] == [2, 3]
    assert all(set(line) == {"step", "eval/small_world", "eval/ai2d"} for line in found)
    assert all(0 <= line["eval/ai2d"] <= 1 and line["eval/small_world"] == 0 for line in found)
    without = trained(tmp_path / "without", *arguments)
    assert [line["loss/total"] for line in log if "loss/total" in line] == [
        line["loss/total"] for line in without if "loss/total" in line
    ]


def test_shares_of_several_processes_add_up(tmp_path, tiny_student_dir):
    data = [
        f"{name}={write(ROWS[name](), tmp_path / f'{name}.jsonl')}" for name in ("mmbench", "hallusionbench")
    ]
    quick = QuickTasks(["mmbench", "hallusionbench"], data, 5)
    model, processor = qwen3vl.load_model(str(tiny_student_dir)), load_processor(tiny_student_dir, None, 9216)
    whole, parts = quick.sums(model, processor), [quick.sums(model, processor, rank, 2) for rank in range(2)]
    assert [a + b for a, b in zip(*parts, strict=True)] == whole
    assert whole[1::2] == [2, 6] and parts[0][1::2] == [1, 4] and parts[1][1::2] == [1, 2]
    assert quick.named([1, 4, 3, 6]) == {"eval/mmbench": 0.25, "eval/hallusionbench": 0.5}


@pytest.mark.parametrize(
    ("names", "data", "mentioned"),
    [(["mmlu"], [], "mmlu"), (["small_world"], [], "run.eval_data"), (["ai2d"], ["ai2d"], "run.eval_data 'ai2d'"), (["ai2d"], ["ai2d=/gone"], "/gone")],
)  # fmt: skip
def test_what_cannot_be_asked_is_said_before_training(names, data, mentioned):
    with pytest.raises(UserError, match=mentioned):
        QuickTasks(names, data, 4)
