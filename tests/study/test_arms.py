"""The declared grid hangs together."""

from pathlib import Path

import pytest

from grace.study.arms import KD, Arm, all_tables, grace, kl, quick_tables, teacher_trial
from grace.study.data import NOISES
from grace.study.trial import resolved


def arms() -> list[Arm]:
    return [arm for table in all_tables() for arm in table.arms]


def test_a_name_means_one_thing() -> None:
    meanings: dict[str, set] = {}
    for arm in arms():
        meanings.setdefault(arm.name, set()).add((arm.trial, arm.adaptive))
    assert {name: len(found) for name, found in meanings.items() if len(found) > 1} == {}


def test_every_weight_is_chosen_or_lent() -> None:
    tuned = {arm.name for arm in arms() if arm.weights}
    for arm in arms():
        distils = resolved(arm.trial, Path("out")).distils if arm.trial.trained else False
        assert not distils or arm.weights or arm.weight_of, arm.name
        assert arm.weight_of is None or arm.weight_of in tuned, arm.name


def test_every_table_compares_with_an_arm_of_its_own() -> None:
    for table in [*all_tables(), *quick_tables()]:
        names = [arm.name for arm in table.arms]
        assert len(set(names)) == len(names), table.name
        assert {table.against, *(arm.against for arm in table.arms)} - {None} <= set(names), table.name
    names = [table.name for table in all_tables()]
    assert len(set(names)) == len(names)


def test_all_arms_train_on_as_much() -> None:
    for arm in arms():
        recipe = resolved(arm.trial, Path("out"))
        assert (recipe.run.max_steps, recipe.optim.batch_size, recipe.optim.lr) == (100, 16, 3e-4), arm.name


def test_weights_are_beta_or_scale_the_controller() -> None:
    fixed = resolved(kl("one", "").weighted(8.0, 3, "test"), Path("out"))
    assert fixed.distill.beta_min == fixed.distill.beta_init == fixed.distill.beta_max == 8.0
    assert fixed.distill.eta == 0 and fixed.run.seed == 3
    scaled = resolved(grace("one", "").weighted(4.0, 0, "test"), Path("out")).distill
    assert (scaled.beta_init, scaled.beta_min, scaled.beta_max) == (2.0, 0.4, 4.0)
    assert scaled.eta == pytest.approx(0.012)


def test_the_parts_are_every_subset() -> None:
    table = next(table for table in all_tables() if table.name == "parts")
    found = set()
    for arm in table.arms:
        recipe = resolved(arm.weighted(1.0, 0, "test"), Path("out")).distill
        found.add((recipe.loss, recipe.rcka_weight > 0, recipe.eta > 0))
    assert len(found) == len(table.arms) == 8
    assert {loss for loss, _, _ in found} == {"kl", "gdkd"}


def test_noisy_teachers_teach_the_same_arms() -> None:
    for noise in NOISES:
        table = next(table for table in all_tables() if table.name == f"noise_{noise}")
        assert {arm.trial.teacher for arm in table.arms[2:]} == {noise}
        assert table.against == f"{KD}_{noise}"
        assert teacher_trial(noise).saved_as == noise
