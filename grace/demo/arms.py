"""The arms of the demo: which recipe each one runs, and the weights it is tuned over."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Arm:
    """One training run of the demo.

    Attributes:
        family: the row of the table it competes for.
        weight: the distillation weight tried, or None where there is none to tune.
        recipe: a packaged recipe.
        overrides: `section.key=value`, besides the paths that every arm gets.
    """

    family: str
    recipe: str
    weight: float | None = None
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.family if self.weight is None else f"{self.family}_x{self.weight:g}"


KD_WEIGHTS = (1.0, 2.0, 4.0)
GRACE_WEIGHTS = (1.0, 2.0, 4.0)


def kd_arm(weight: float) -> Arm:
    """QAT + plain KL distillation at a fixed weight."""
    fixed = tuple(f"distill.{key}={weight}" for key in ("beta_init", "beta_min", "beta_max"))
    return Arm("kd", "small_world/kd_w4.yaml", weight, fixed)


def grace_arm(weight: float) -> Arm:
    """GRACE with the published controller interval and step, all multiplied by `weight`."""
    scaled = {"beta_init": 0.5, "beta_min": 0.1, "beta_max": 1.0, "eta": 0.003}
    return Arm(
        "grace",
        "small_world/grace_w4.yaml",
        weight,
        tuple(f"distill.{key}={value * weight}" for key, value in scaled.items()),
    )


def demo_arms(quick: bool) -> list[Arm]:
    """Every run of the demo; `quick` tries one weight per distillation arm."""
    kd = KD_WEIGHTS if not quick else KD_WEIGHTS[1:2]
    grace = GRACE_WEIGHTS if not quick else GRACE_WEIGHTS[1:2]
    plain = [
        Arm("student_control", "small_world/student_control.yaml"),
        Arm("qat", "small_world/qat_w4.yaml"),
    ]
    return plain + [kd_arm(weight) for weight in kd] + [grace_arm(weight) for weight in grace]


def path_overrides(out: Path, arm: Arm, seed: int, extra: Sequence[str] = ()) -> tuple[str, ...]:
    """All overrides of an arm inside the demo directory `out`."""
    data = out / "data"
    return (
        f"run.output_dir={out / 'arms' / arm.name}",
        f"run.seed={seed}",
        f"data.path={data / 'qat_train.json'}",
        f"data.validation_path={data / 'validation.json'}",
        f"student.path={out / 'student'}",
        *((f"teacher.path={out / 'teacher'}",) if arm.family in ("kd", "grace") else ()),
        *arm.overrides,
        *extra,
    )
