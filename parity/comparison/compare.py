"""One comparison for everything: where two arrays part most, and how much of the tolerance that uses."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst element of `got` against `want`; `share` is its error over what is allowed there."""

    name: str
    error: float
    share: float
    index: tuple[int, ...]
    got: float
    want: float

    @property
    def ok(self) -> bool:
        return self.share <= 1

    def __str__(self) -> str:
        place = f"{self.name}{list(self.index)}" if self.index else self.name
        values = f"{self.got:.9g} against {self.want:.9g}, {self.error:.3g} apart"
        return f"{place}: {values}, {self.share:.1%} of the tolerance"


def compare(name: str, got: np.ndarray, want: np.ndarray, atol: float, rtol: float = 0.0) -> Comparison:
    """Compare elementwise in float64: |got - want| <= atol + rtol |want|; anything not finite fails.

    Raises ValueError for different shapes.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"{name}: shape {got.shape} against {want.shape}")
    errors = np.abs(got - want)
    shares = np.where(np.isfinite(errors), errors / (atol + rtol * np.abs(want)), np.inf)
    index = tuple(int(i) for i in np.unravel_index(shares.argmax(), shares.shape))
    return Comparison(name, float(errors[index]), float(shares[index]), index, float(got[index]), float(want[index]))
