"""The learning rate over a run."""

import math


def learning_rate_factor(step: int, total: int, warmup_ratio: float, schedule: str) -> float:
    """Multiplier of the base rate at `step` (0-based): linear warm-up, then constant or half a cosine to 0."""
    warmup = math.ceil(warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))
