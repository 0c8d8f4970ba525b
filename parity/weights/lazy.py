"""A tensor that stays in its file until it is used."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True)
class LazyTensor:
    """A tensor whose values np.asarray(...) reads from a file, each time it is called."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    """Dtype of the array that is read."""
    read: Callable[[], np.ndarray]
    """Reads and checks the values."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.read().astype(dtype or self.dtype, copy=False)
