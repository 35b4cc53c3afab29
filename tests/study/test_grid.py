"""Which trials are run, and in which order; what a row's key depends on."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from grace.study.arms import Arm, Table, arm, grace, kl, quick_tables
from grace.study.grid import Study
from grace.study.trial import Trial

KL = replace(kl("kd", "KL"), weights=(1.0, 2.0))
LENT = grace("lent", "GRACE", weight_of="kd")
RTN = arm("rtn", "round to nearest", "qat_w4", trained=False)


def study(out: Path, *arms: Arm, seeds: int = 2) -> Study:
    return Study(out, [Table("one", "One", arms, "kd")], seeds)


def row(match: float, ce: float = 0.1) -> dict:
    return {"scores": {"exact_match": match, "ce": ce}}


def finish(one: Study, trials: list[Trial], *rows: dict) -> None:
    for trial, found in zip(trials, rows, strict=True):
        one.rows[one.key(trial)] = found


def test_weights_first_then_arms_seed_by_seed(study_dir: Path) -> None:
    one = study(study_dir, RTN, KL, LENT)
    first = list(one.pending())
    tuning = [
        (trial.setting("distill.beta_init"), trial.seed) for trial in first if trial.split == "validation"
    ]
    assert tuning == [("1", 100), ("1", 101), ("2", 100), ("2", 101)]
    assert [trial.trained for trial in first[4:]] == [False]  # needs no weight
    assert one.missing() == 4 + 1 + 2 + 2
    finish(one, first[:4], row(0.7), row(0.7), row(0.6), row(0.9))
    assert one.chosen(one.arm("kd")) == one.chosen(LENT) == 2.0
    assert [(trial.seed, trial.trained, trial.recipe) for trial in one.pending()] == [
        (0, False, "small_world/qat_w4.yaml"),
        (0, True, "small_world/kd_w4.yaml"), (0, True, "small_world/grace_w4.yaml"),
        (1, True, "small_world/kd_w4.yaml"), (1, True, "small_world/grace_w4.yaml"),
    ]  # fmt: skip
    finish(one, list(one.pending()), *[row(0.8)] * 5)
    assert list(one.pending()) == [] and one.missing() == 0
    assert list(one.results(LENT)) == [0, 1]


def test_equal_matches_are_told_apart_by_cross_entropy_and_divergence_loses(study_dir: Path) -> None:
    three = replace(KL, weights=(1.0, 2.0, 4.0))
    one = study(study_dir, three)
    for weight, *rows in ((1.0, row(0.5, 0.3), row(0.7, 0.3)), (2.0, row(0.6, 0.2), row(0.6, 0.2)),
                          (4.0, row(0.99), {"failed": "the loss is not finite"})):  # fmt: skip
        finish(one, one.tuning_trials(three, weight), *rows)
    assert one.chosen(three) == 2.0


def test_a_noisy_teacher_is_made_before_it_teaches(study_dir: Path) -> None:
    noisy = replace(LENT, name="noisy", trial=replace(LENT.trial, teacher="misled"))
    one = study(study_dir, KL, noisy)
    for weight in KL.weights:
        finish(one, one.tuning_trials(KL, weight), row(0.5), row(0.5))
    wanted = [trial.saved_as for trial in one.pending() if trial.recipe != KL.trial.recipe]
    assert wanted == ["misled", "misled"]


def test_only_some_tables_borrow_weights_from_the_others(study_dir: Path) -> None:
    tables = [Table("one", "One", (KL,)), Table("two", "Two", (LENT,))]
    one = Study(study_dir, tables, seeds=1, only=["two"])
    assert [trial.split for trial in one.pending()] == ["validation"] * 4
    assert one.missing() == 5 and one.missing(everything=True) == 6


# ---------------------------------------------------------------- keys


def test_a_key_does_not_depend_on_where_the_study_is(study_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "elsewhere"
    shutil.copytree(study_dir / "world", other / "world", ignore=shutil.ignore_patterns("*.png"))
    for table in quick_tables():
        for one in table.arms:
            trial = one.weighted(1.0 if one.weights else None, 0, "test")
            assert study(study_dir).key(trial) == study(other).key(trial)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"split": "validation"}, {"kernels": "once"}, {"cached": True}, {"start": "teacher"},
        {"teacher": "misled"}, {"trained": False}, {"overrides": ("distill.beta_init=1", "distill.beta_max=1")},
    ],
)  # fmt: skip
def test_a_key_depends_on_what_decides_the_numbers(study_dir: Path, change: dict) -> None:
    one, trial = study(study_dir), Trial("small_world/grace_w4.yaml")
    assert one.key(trial) != one.key(replace(trial, **change))


def test_a_key_does_not_depend_on_how_the_same_recipe_is_said(study_dir: Path) -> None:
    """Defaults spelled out, paths, what is logged: also a field that does not exist yet has its default."""
    one, trial = study(study_dir), Trial("small_world/grace_w4.yaml")
    said = (
        "distill.temperature=2.0",
        "run.log_every=3",
        "distill.gate_sharpness=1",
        "teacher.micro_batch_size=null",
    )
    assert one.key(trial) == one.key(replace(trial, overrides=said))


def test_a_key_depends_on_the_data(study_dir: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(study_dir / "world", other / "world", ignore=shutil.ignore_patterns("*.png"))
    path = other / "world" / "train_0.json"
    path.write_text(path.read_text().replace("plus", "and"))
    trained, untouched = Trial("small_world/kd_w4.yaml"), Trial("small_world/kd_w4.yaml", trained=False)
    assert study(study_dir).key(trained) != study(other).key(trained)
    assert study(study_dir).key(untouched) == study(other).key(untouched)
