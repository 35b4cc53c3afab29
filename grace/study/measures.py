"""What is read off the rows of an arm: scores by seed, means, differences."""

from collections.abc import Callable

from grace.study.arms import Arm, Table
from grace.study.grid import Row, Study
from grace.study.stats import Estimate, estimate, paired

Measure = Callable[[Row], float]


def exact_match(row: Row) -> float:
    """Share of questions answered exactly."""
    return row["scores"]["exact_match"]


def cross_entropy(row: Row) -> float:
    """Nats per token of the right answers."""
    return row["scores"]["ce"]


def snapped_match(row: Row) -> float:
    """Exact match with the scales that an export would hold."""
    return row.get("scores_snapped", row["scores"])["exact_match"]


def of_kinds(kinds: tuple[str, ...], others: bool = False) -> Measure:
    """Exact match on some kinds of question, or on all others."""

    def measure(row: Row) -> float:
        parts = [part for kind, part in row["scores"]["by_type"].items() if (kind in kinds) != others]
        return sum(part["exact_match"] * part["turns"] for part in parts) / sum(p["turns"] for p in parts)

    return measure


def by_seed(study: Study, arm: Arm, measure: Measure) -> dict[int, float]:
    """A measure of an arm by seed; a trial that diverged has none."""
    return {seed: measure(row) for seed, row in study.results(arm).items() if "failed" not in row}


def mean(study: Study, arm: Arm, measure: Measure) -> Estimate | None:
    """Over the seeds there are; None without any."""
    values = by_seed(study, arm, measure)
    return estimate(list(values.values())) if values else None


def compared(arm: Arm, table: Table) -> Arm | None:
    """The arm that differences are taken to; None for that one itself, and where nothing is trained."""
    if table.against is None or not arm.trial.trained:
        return None
    names = (arm.against, table.against)
    base = next((one for name in names for one in table.arms if one.name == name), None)
    return None if base is None or base.name == arm.name else base


def difference(study: Study, arm: Arm, table: Table, measure: Measure) -> Estimate | None:
    """To what the table compares with, seed by seed."""
    base = compared(arm, table)
    return base and paired(by_seed(study, arm, measure), by_seed(study, base, measure))
