"""Every arm of the demo trains on the same data for the same steps."""

import dataclasses
from pathlib import Path

import pytest

from grace.config import load_recipe
from grace.demo.arms import GRACE_WEIGHTS, KD_WEIGHTS, demo_arms, path_overrides


def recipes(quick: bool = False) -> dict:
    return {
        arm.name: load_recipe(arm.recipe, path_overrides(Path("out"), arm, seed=3))
        for arm in demo_arms(quick)
    }


def test_data_steps_and_optimizer_are_the_same_in_every_arm() -> None:
    loaded = recipes()
    control = loaded["student_control"]
    for name, recipe in loaded.items():
        assert recipe.data == control.data and recipe.optim == control.optim, name
        assert recipe.student == control.student, name
        assert dataclasses.replace(recipe.run, output_dir="") == dataclasses.replace(
            control.run, output_dir=""
        )


def test_what_the_arms_differ_in() -> None:
    loaded = recipes()
    assert loaded["student_control"].quant.bits is None
    assert all(recipe.quant.bits == 4 for name, recipe in loaded.items() if name != "student_control")
    assert loaded["qat"].distill.loss == "none" and loaded["qat"].teacher.path is None
    for weight in KD_WEIGHTS:
        kd = loaded[f"kd_x{weight:g}"].distill
        assert (
            kd.loss == "kl" and kd.beta_min == kd.beta_init == kd.beta_max == weight and kd.rcka_weight == 0
        )
    for weight in GRACE_WEIGHTS:
        grace = loaded[f"grace_x{weight:g}"].distill
        assert grace.loss == "gdkd" and grace.rcka_weight == 3.0
        published = (0.5, 0.1, 1.0, 0.003)
        scaled = (grace.beta_init, grace.beta_min, grace.beta_max, grace.eta)
        assert scaled == pytest.approx([weight * value for value in published])


def test_quick_tries_one_weight_of_each_family() -> None:
    assert [arm.family for arm in demo_arms(quick=True)] == ["student_control", "qat", "kd", "grace"]
    assert len({arm.name for arm in demo_arms(quick=False)}) == 2 + len(KD_WEIGHTS) + len(GRACE_WEIGHTS)
