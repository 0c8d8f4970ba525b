"""Elementwise comparison of two arrays: the element that uses most of its tolerance."""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The worst element of `got` against `want`."""

    name: str
    error: float
    """Absolute error of the worst element."""
    share: float
    """That error divided by the tolerance of the element; infinite if a value is not finite."""
    index: tuple[int, ...]
    got: float
    want: float

    @property
    def ok(self) -> bool:
        """Whether every element is within its tolerance."""
        return self.share <= 1

    def __str__(self) -> str:
        element = f"{self.name}{list(self.index)}" if self.index else self.name
        values = f"{self.got:.9g}, expected {self.want:.9g}, error {self.error:.3g}"
        return f"{element}: {values}, {self.share:.1%} of the tolerance"


def compare(name: str, got: np.ndarray, want: np.ndarray, atol: float, rtol: float = 0.0) -> Comparison:
    """Compare two arrays elementwise in float64: |got - want| <= atol + rtol |want|.

    A value that is not finite fails. Raises ValueError if the shapes differ.
    """
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    if got.shape != want.shape:
        raise ValueError(f"{name}: got shape {got.shape}, expected {want.shape}")
    errors = np.abs(got - want)
    shares = np.where(np.isfinite(errors), errors / (atol + rtol * np.abs(want)), np.inf)
    index = tuple(int(i) for i in np.unravel_index(shares.argmax(), shares.shape))
    return Comparison(name, float(errors[index]), float(shares[index]), index, float(got[index]), float(want[index]))
