"""The rows of a parity report: two implementations A and B, a float64 reference, and an error bound.

A row passes if the errors of A and B against the reference are within the bound that rounding allows
(parity/comparison/error_bounds.py) and A and B differ by at most twice the bound. The first row that fails, in
the order of the computation, shows where the two implementations diverge.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from parity.comparison.compare import compare

COLUMNS = ("name", "worst |A-B|", "mean |A-B|", "|A-ref|", "|B-ref|", "bound", "share of bound")


@dataclasses.dataclass(frozen=True)
class Row:
    """One comparison; errors are absolute, of the worst element."""

    section: str
    name: str
    difference: float
    """|A - B|."""
    mean_difference: float
    """Mean |A - B|."""
    error_a: float | None
    """|A - reference|; None if there is no reference."""
    error_b: float | None
    """|B - reference|."""
    bound: float
    """Upper bound of either error, derived from rounding."""
    detail: str = ""

    @property
    def share(self) -> float:
        """The largest error as a fraction of its bound; above 1 the row fails. Infinite if an error is not finite."""
        errors = [self.difference / 2, *(e for e in (self.error_a, self.error_b) if e is not None)]
        if not np.isfinite(errors).all():
            return np.inf
        worst = max(errors)
        return worst / self.bound if self.bound else (np.inf if worst else 0.0)

    @property
    def ok(self) -> bool:
        """Whether all errors are within their bounds."""
        return self.share <= 1

    def to_dict(self) -> dict[str, Any]:
        """Return the entries of the row in report.json."""
        return {**dataclasses.asdict(self), "share": float(self.share), "ok": self.ok}

    def cells(self) -> list[str]:
        """Return the text of the row in each of COLUMNS."""
        numbers = (self.difference, self.mean_difference, self.error_a, self.error_b, self.bound)
        return [self.name, *("" if n is None else f"{n:.2e}" for n in numbers), f"{self.share:.0%}"]


def make_row(section: str, name: str, a: np.ndarray, b: np.ndarray, exact: np.ndarray, bound: float) -> Row:
    """Compare A and B with each other and with the exact values; a value that is not finite fails."""
    between = compare(name, a, b, 1.0)
    if not np.isfinite(between.share):
        return Row(section, name, np.nan, np.nan, np.nan, np.nan, bound, "not finite")
    error_a, error_b = (compare(name, array, exact, 1.0).error for array in (a, b))
    mean = float(np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)).mean())
    detail = f"largest difference at {list(between.index)}: {between.got:.9g}, {between.want:.9g}"
    return Row(section, name, between.error, mean, error_a, error_b, bound, detail)


def first_failure(rows: Sequence[Row]) -> Row | None:
    """Return the first row, in the order of the computation, that exceeds its bound; None if no row does."""
    return next((row for row in rows if not row.ok), None)


def by_section(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return {section: its rows}, in the order of the rows."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(row.section, []).append(row)
    return sections


def verdict(rows: Sequence[Row]) -> str:
    """Return a sentence that says whether all rows are within their bounds, or names the first one that is not."""
    failure = first_failure(rows)
    if failure is None:
        return f"all {len(rows)} rows are within their error bounds"
    return f"the first row beyond its error bound is {failure.name} ({failure.section}; {failure.detail})"
