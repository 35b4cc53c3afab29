"""A trial trains as `grace.train` does, and gives the same row whatever ran before it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from grace.config import load_recipe
from grace.models import qwen3vl
from grace.quant import fake_quant
from grace.study import trial as trials
from grace.study.arms import teacher_trial
from grace.study.trial import Trial, data_path, model_path, resolved, run_trial
from grace.train import train

SHORT = ("run.max_steps=2", "optim.batch_size=8", "run.micro_batch_size=8", "quant.bits=2")
GRACE = Trial("small_world/grace_w4.yaml", SHORT, split="validation")
KL = Trial("small_world/kd_w4.yaml", SHORT, split="validation")
VARIABLE = ("seconds", "cpu_seconds")


@pytest.fixture(autouse=True)
def own_process(monkeypatch: pytest.MonkeyPatch):
    """One thread and the quantizer's usual kernels, given back afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(fake_quant, "_kernels", {})
    yield
    torch.set_num_threads(threads)


def outcome(trial: Trial, out: Path) -> dict:
    return {name: value for name, value in run_trial(trial, out).items() if name not in VARIABLE}


@pytest.fixture(scope="module")
def alone(study_dir: Path) -> dict:
    """The row of a trial before which nothing ran."""
    torch.set_num_threads(1)
    trials.forget()
    return outcome(GRACE, study_dir)


def test_a_row_does_not_depend_on_what_ran_before(study_dir: Path, alone: dict) -> None:
    trials.forget()
    outcome(replace(KL, seed=1), study_dir)
    outcome(KL, study_dir)
    assert outcome(GRACE, study_dir) == alone


def test_it_trains_as_the_command_does(study_dir: Path, alone: dict, tmp_path: Path) -> None:
    """The teacher's rows are multiplied in other groups there, which the last bits show."""
    recipe = resolved(GRACE, study_dir)
    validation = study_dir / "world" / "validation.json"
    overrides = [
        *SHORT, f"data.path={data_path(study_dir, GRACE)}", f"data.validation_path={validation}",
        f"run.output_dir={tmp_path / 'run'}", "run.log_every=1", f"run.seed={recipe.run.seed}",
    ]  # fmt: skip
    train(load_recipe(GRACE.recipe, overrides))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss/total" in line]
    for name in ("loss/ce", "loss/gdkd", "loss/rcka", "ib/beta", "gate/mean"):
        assert alone["log"][name] == pytest.approx([line[name] for line in steps], rel=1e-4), name
    assert alone["scores"]["ce"] == pytest.approx(lines[-1]["val/ce"], rel=1e-3)


def test_quantizing_once_a_step_is_the_same(study_dir: Path) -> None:
    cut = replace(GRACE, overrides=(*SHORT, "run.micro_batch_size=4"))
    often, once = (outcome(replace(cut, kernels=name), study_dir) for name in ("torch", "once"))
    assert often == once


def test_scales_that_are_never_rounded_are_scored_both_ways(study_dir: Path, alone: dict) -> None:
    row = outcome(replace(GRACE, kernels="unsnapped"), study_dir)
    assert row["weights_sha256"] != alone["weights_sha256"]
    assert row["scores"]["ce"] != row["scores_snapped"]["ce"]
    assert row["scores"]["ce"] == pytest.approx(row["scores_snapped"]["ce"], rel=0.1)
    assert outcome(GRACE, study_dir) == alone  # the next trial rounds again


def test_untrained_is_round_to_nearest(study_dir: Path) -> None:
    one, two = (
        outcome(replace(KL, trained=False, seed=seed, overrides=("quant.bits=4",)), study_dir)
        for seed in (0, 1)
    )
    assert one == two and one["log"] == {}
    assert one["scores"]["turns"] == 40 and len(one["scores"]["by_type"]) == 8


@pytest.mark.slow
def test_a_cached_teacher_and_a_noisy_one(study_dir: Path, alone: dict) -> None:
    cached = outcome(replace(GRACE, cached=True), study_dir)
    assert cached["log"]["loss/ce"][0] == pytest.approx(alone["log"]["loss/ce"][0])
    making = teacher_trial("misled")
    outcome(replace(making, overrides=(*making.overrides, "run.max_steps=1"), split="validation"), study_dir)
    qwen3vl.load_model(str(model_path(study_dir, "misled")), torch.float32)
    noisy = outcome(replace(GRACE, teacher="misled"), study_dir)
    assert noisy["log"]["loss/gdkd"] != alone["log"]["loss/gdkd"]


def test_divergence_is_a_row(study_dir: Path) -> None:
    row = outcome(replace(KL, overrides=(*SHORT, "optim.lr=1.0e+30")), study_dir)
    assert "not finite" in row["failed"] and "scores" not in row
