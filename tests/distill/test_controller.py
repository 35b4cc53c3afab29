"""The controller against its two recurrences, its limits, and its memory."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from grace.distill.controller import IBController

PUBLISHED = {"tau": 3.0, "eta": 0.003, "beta_init": 0.5, "beta_min": 0.1, "beta_max": 1.0}
losses = st.lists(st.floats(0, 100), min_size=1, max_size=60)


@settings(max_examples=100, deadline=None)
@given(
    values=losses,
    tau=st.floats(0, 10),
    eta=st.floats(0, 0.5),
    decay=st.sampled_from([0.0, 0.5, 0.9, 0.99]),
)
def test_recurrences(values: list[float], tau: float, eta: float, decay: float) -> None:
    controller = IBController(tau, eta, 0.5, 0.1, 1.0, decay)
    beta = 0.5
    for step, value in enumerate(values):
        # m in closed form: the first value is its start.
        weights = [decay**step] + [(1 - decay) * decay ** (step - i) for i in range(1, step + 1)]
        m = math.fsum(w * v for w, v in zip(weights, values, strict=False))
        beta = min(max(beta + eta * (m - tau), 0.1), 1.0)
        assert controller.update(value) == controller.beta
        assert controller.m == pytest.approx(m, rel=1e-9, abs=1e-12)
        assert controller.beta == pytest.approx(beta, rel=1e-9)
        beta = controller.beta


def test_published_settings_move_as_worked_out_by_hand() -> None:
    controller = IBController(**PUBLISHED)
    assert controller.update(5.0) == pytest.approx(0.5 + 0.003 * 2.0)
    assert controller.m == 5.0
    assert controller.update(1.0) == pytest.approx(0.506 + 0.003 * (0.99 * 5.0 + 0.01 * 1.0 - 3.0))


def test_beta_stays_within_its_bounds_and_comes_back() -> None:
    controller = IBController(3.0, 1.0, 0.5, 0.1, 1.0, ema_decay=0.0)
    assert [controller.update(value) for value in (100.0, 2.75, 0.0, 0.0, 3.25)] == [
        1.0,
        0.75,
        0.1,
        0.1,
        0.35,
    ]


def test_without_eta_beta_does_not_move() -> None:
    controller = IBController(3.0, 0.0, 0.5, 0.1, 1.0)
    assert {controller.update(value) for value in (0.0, 50.0, 3.0)} == {0.5}
    assert controller.m is not None and controller.m > 0


def test_auto_takes_its_target_from_the_warm_up() -> None:
    controller = IBController("auto", 0.1, 0.5, 0.1, 1.0, ema_decay=0.5, tau_fraction=0.8, tau_warmup_steps=3)
    assert [controller.update(value) for value in (4.0, 2.0)] == [0.5, 0.5] and controller.tau is None
    assert controller.update(1.0) == 0.5  # the last step of the warm-up fixes tau only
    assert controller.m == 2.0 and controller.tau == pytest.approx(1.6)
    assert controller.update(2.0) == pytest.approx(0.5 + 0.1 * (2.0 - 1.6))
    assert controller.tau == pytest.approx(1.6)


@settings(max_examples=50, deadline=None)
@given(values=losses, cut=st.integers(0, 60), tau=st.sampled_from([2.0, "auto"]))
def test_resumed_controller_goes_on_to_the_bit(values: list[float], cut: int, tau: float | str) -> None:
    def fresh() -> IBController:
        return IBController(tau, 0.01, 0.5, 0.1, 1.0, tau_warmup_steps=5)

    straight, first, second = fresh(), fresh(), fresh()
    betas = [straight.update(value) for value in values]
    resumed = [first.update(value) for value in values[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    resumed += [second.update(value) for value in values[cut:]]
    assert resumed == betas and second.state_dict() == straight.state_dict()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_loss_that_is_no_number_is_refused_and_changes_nothing(value: float) -> None:
    controller = IBController(**PUBLISHED)
    controller.update(2.0)
    before = controller.state_dict()
    with pytest.raises(ValueError, match="not finite"):
        controller.update(value)
    assert controller.state_dict() == before


def test_state_of_something_else_is_refused() -> None:
    controller = IBController(**PUBLISHED)
    state = controller.state_dict()
    for wrong in ({}, {**state, "extra": 1}, {key: state[key] for key in ("m", "beta", "tau")}):
        with pytest.raises(ValueError, match="controller state has keys"):
            controller.load_state_dict(wrong)
    assert controller.state_dict() == state


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tau": "automatic"}, "tau must be"),
        ({"beta_init": 1.5}, "beta_init 1.5 must lie"),
        ({"beta_min": 0.6}, "beta_init 0.5 must lie"),
        ({"eta": -0.1}, "eta"),
        ({"eta": math.nan}, "eta"),
        ({"ema_decay": 1.0}, "ema_decay"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, float | str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IBController(**{**PUBLISHED, **change})
