"""From the values of the items to a metric with its standard error.

Every metric is a sum over the items divided by another, such as log-probabilities by tokens, or a function of that
ratio, such as the perplexity. Its standard error is that of a ratio of sums over independent items (the delta method):
sqrt(n / (n - 1) * sum((a - ratio * b)**2)) / sum(b), times the derivative of the function. For a mean, where every b
is 1, that is the usual standard error.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

Row = Mapping[str, Any]
"""The values of one item, by the names of its fields."""


@dataclasses.dataclass(frozen=True)
class Metric:
    """What to compute from the items."""

    name: str
    field: str
    """The field of the items that is summed."""
    unit: str
    """The unit of the value, for people."""
    per: str | None = None
    """The field whose sum it is divided by; by default each item counts as 1."""
    transform: Literal["mean", "nats", "bits", "perplexity"] = "mean"
    """What becomes of the ratio; all but "mean" expect log-probabilities in nats."""
    group: str | None = None
    """A field: the value is then the mean over the groups of items that agree in it, each of which weighs the same."""


class Estimate(NamedTuple):
    """The value of a metric."""

    value: float
    standard_error: float | None
    """None for a single item."""
    groups: dict[str, float]
    """The value of each group, if the metric has groups."""


def estimate(metric: Metric, rows: Sequence[Row]) -> Estimate:
    """Return the value of a metric over the items of `rows`, of which there must be at least one."""
    parts = {name: _ratio(metric, part) for name, part in _groups(metric, rows).items()}
    ratio = math.fsum(ratio for ratio, _ in parts.values()) / len(parts)
    value, slope = _transformed(metric, ratio)
    errors = [_error(deviations) for _, deviations in parts.values()]
    error = None if None in errors else abs(slope) * math.hypot(*filter(None, errors)) / len(parts)
    groups = {name: _transformed(metric, ratio)[0] for name, (ratio, _) in parts.items()} if metric.group else {}
    return Estimate(value, error, groups)


def difference(metric: Metric, a: Sequence[Row], b: Sequence[Row]) -> Estimate:
    """Return by how much a metric of `b` exceeds that of `a`, two models' results for the same items in the same order.

    The standard error is that of paired items, which is far below those of the two values if the models agree about
    which items are hard.
    """
    parts_a, parts_b = ({name: _ratio(metric, part) for name, part in _groups(metric, rows).items()} for rows in (a, b))
    ratios = [math.fsum(ratio for ratio, _ in parts.values()) / len(parts) for parts in (parts_a, parts_b)]
    (value_a, slope_a), (value_b, slope_b) = (_transformed(metric, ratio) for ratio in ratios)
    errors = [_error(slope_b * parts_b[name][1] - slope_a * parts_a[name][1]) for name in parts_a]
    error = None if None in errors else math.hypot(*filter(None, errors)) / len(parts_a)
    return Estimate(value_b - value_a, error, {})


def _groups(metric: Metric, rows: Sequence[Row]) -> dict[str, list[Row]]:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault("" if metric.group is None else str(row[metric.group]), []).append(row)
    return groups


def _ratio(metric: Metric, rows: Sequence[Row]) -> tuple[float, np.ndarray]:
    """Return the ratio of the sums, and how much each item deviates from it [n], in units of the ratio."""
    a = np.array([float(row[metric.field]) for row in rows])
    b = np.array([1.0 if metric.per is None else float(row[metric.per]) for row in rows])
    total = math.fsum(b)
    ratio = math.fsum(a) / total
    return ratio, (a - ratio * b) / total


def _error(deviations: np.ndarray) -> float | None:
    n = len(deviations)
    return None if n < 2 else math.sqrt(n / (n - 1) * math.fsum(deviations**2))


def _transformed(metric: Metric, ratio: float) -> tuple[float, float]:
    """Return a function of the ratio, and its derivative."""
    match metric.transform:
        case "nats":
            return -ratio, -1.0
        case "bits":
            return -ratio / math.log(2), -1 / math.log(2)
        case "perplexity":
            value = math.exp(-ratio) if -ratio < 700 else math.inf
            return value, -value
        case _:
            return ratio, 1.0
