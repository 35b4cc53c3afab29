"""How long, from where and how many-sided the records of a file are."""

from typing import Any

import numpy as np

from grace.data.audit import COUNTS, FileAudit
from grace.data.faults import Policies

QUANTILES = (0, 5, 25, 50, 75, 95, 99, 100)  # percent


def statistics(audit: FileAudit, policies: Policies) -> dict[str, Any]:
    """Distributions over the records that training can use, as JSON-able values.

    For each of `audit.COUNTS` sum, mean and percentiles; how many records have so many turns and images;
    and for each source its records, tokens and their mean.
    """
    used = audit.used(policies)
    counts_NC = audit.counts_NC[used].astype(np.int64)
    sources = np.array(audit.sources, dtype=object)[used]
    columns = dict(zip(COUNTS, counts_NC.T, strict=True))
    return {
        "records": len(audit.sources),
        "used": len(used),
        "lengths": {name: _spread(column) for name, column in columns.items()},
        "records_by_turns": _histogram(columns["turns"]),
        "records_by_images": _histogram(columns["images"]),
        "sources": {
            source: _of_source(counts_NC[sources == source]) for source in sorted(set(sources.tolist()))
        },
    }


def _spread(values: np.ndarray) -> dict[str, Any]:
    if len(values) == 0:
        return {"sum": 0, "mean": None, "percentiles": {}}
    points = np.percentile(values, QUANTILES, method="inverted_cdf")
    percentiles = {str(q): int(point) for q, point in zip(QUANTILES, points, strict=True)}
    return {"sum": int(values.sum()), "mean": float(values.mean()), "percentiles": percentiles}


def _histogram(values: np.ndarray) -> dict[str, int]:
    kinds, counts = np.unique(values, return_counts=True)
    return {str(kind): int(count) for kind, count in zip(kinds, counts, strict=True)}


def _of_source(counts_NC: np.ndarray) -> dict[str, Any]:
    tokens = counts_NC[:, COUNTS.index("tokens")]
    return {
        "records": len(counts_NC),
        "images": int(counts_NC[:, COUNTS.index("images")].sum()),
        "tokens": int(tokens.sum()),
        "mean_tokens": float(tokens.mean()),
        "max_tokens": int(tokens.max()),
    }
