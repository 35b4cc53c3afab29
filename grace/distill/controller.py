"""The adaptive information-bottleneck controller of the distillation weight.

DESIGN section 4 (arXiv:2601.22709), once per optimizer step with the step's global L_GDKD:

    m    <- d m + (1 - d) L_GDKD
    beta <- clip(beta + eta (m - tau), beta_min, beta_max)

beta rises while the student is further from the teacher than tau and falls when it is closer.
"""

import math
from collections.abc import Mapping
from typing import Any

STATE_KEYS = ("m", "beta", "tau", "steps")


class IBController:
    """Keeps the moving average `m` of the distillation loss and the weight `beta`.

    `m` starts at the first value given, so that there is no bias towards 0. With `tau="auto"`, beta
    stays at `beta_init` during the first `tau_warmup_steps` updates; the last of them fixes
    tau = tau_fraction * m for good, and beta moves from the next update on. `eta=0` keeps beta fixed.

    Attributes:
        beta: current weight of the distillation loss.
        m: moving average of the values, in nats per token; None before the first.
        tau: target of `m`; None while "auto" warms up.

    Raises:
        ValueError: a setting is out of its range.
    """

    def __init__(
        self,
        tau: float | str,
        eta: float,
        beta_init: float,
        beta_min: float,
        beta_max: float,
        ema_decay: float = 0.99,
        tau_fraction: float = 0.9,
        tau_warmup_steps: int = 50,
    ):
        if isinstance(tau, str) and tau != "auto":
            raise ValueError(f'tau must be a number or "auto", got {tau!r}')
        if not beta_min <= beta_init <= beta_max:
            raise ValueError(
                f"beta_init {beta_init} must lie in [beta_min, beta_max] = [{beta_min}, {beta_max}]"
            )
        if not 0.0 <= ema_decay < 1.0:
            raise ValueError(f"ema_decay must lie in [0, 1), got {ema_decay}")
        if not eta >= 0.0:
            raise ValueError(f"eta must not be negative, got {eta}")
        self.eta = eta
        self.beta_min, self.beta_max = beta_min, beta_max
        self.ema_decay = ema_decay
        self.tau_fraction, self.tau_warmup_steps = tau_fraction, tau_warmup_steps
        self.tau: float | None = None if isinstance(tau, str) else float(tau)
        self.m: float | None = None
        self.beta = float(beta_init)
        self.steps = 0

    def update(self, value: float) -> float:
        """Takes one optimizer step's L_GDKD and returns the beta of the next step.

        Raises:
            ValueError: the value is NaN or infinite; the state is left as it was.
        """
        value = float(value)
        if not math.isfinite(value):
            raise ValueError(f"the distillation loss given to the controller is not finite: {value}")
        decay = self.ema_decay
        self.m = value if self.m is None else decay * self.m + (1.0 - decay) * value
        self.steps += 1
        if self.tau is None:
            if self.steps >= self.tau_warmup_steps:
                self.tau = self.tau_fraction * self.m
            return self.beta
        self.beta = min(max(self.beta + self.eta * (self.m - self.tau), self.beta_min), self.beta_max)
        return self.beta

    def state_dict(self) -> dict[str, float | int | None]:
        """All that changes, as JSON-able numbers."""
        return {"m": self.m, "beta": self.beta, "tau": self.tau, "steps": self.steps}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over a `state_dict`; later updates are bit for bit those of its source.

        Raises:
            ValueError: a key is missing or unknown.
        """
        if set(state) != set(STATE_KEYS):
            raise ValueError(f"controller state has keys {sorted(state)}, expected {sorted(STATE_KEYS)}")
        self.m = None if state["m"] is None else float(state["m"])
        self.tau = None if state["tau"] is None else float(state["tau"])
        self.beta, self.steps = float(state["beta"]), int(state["steps"])
