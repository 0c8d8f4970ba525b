"""Conversion of arrays of any framework to NumPy arrays, without importing the framework."""

from typing import Any

import numpy as np


def as_numpy(array: Any, dtype: Any = None) -> np.ndarray:
    """Return an array of NumPy, PyTorch or JAX, or a number or list, as a NumPy array.

    Args:
        array: The array. A tensor of PyTorch may require gradients and be on any device; a dtype that NumPy lacks,
            such as bfloat16, becomes float32, which holds the same values exactly.
        dtype: The dtype of the result; by default that of the array.
    """
    if hasattr(array, "detach"):
        array = array.detach().cpu()
        try:
            array = array.numpy(force=True)
        except TypeError:
            array = array.float().numpy(force=True)
    return np.asarray(array, dtype)
