"""Conversion of arrays of any framework to NumPy arrays, without importing the framework, and fast copies."""

import concurrent.futures
import functools
import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np

_ALIGNMENT = 64  # bytes; JAX can use an array that is aligned so without copying it
_THREADS = min(4, os.cpu_count() or 1)
_PART = 2**18  # values; what a thread copies or adds up at a time


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


def aligned_empty(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Return an array like numpy.empty's, whose first value is at an address that is a multiple of 64."""
    dtype = np.dtype(dtype)
    size = math.prod(shape) * dtype.itemsize
    # Not numpy.empty, which asks for huge pages: where the memory is fragmented, the system takes seconds to make them.
    buffer = np.zeros(size + _ALIGNMENT, np.uint8)
    start = -buffer.ctypes.data % _ALIGNMENT
    return buffer[start : start + size].view(dtype).reshape(shape)


def copy_into(target: np.ndarray, source: np.ndarray) -> None:
    """Copy an array into another of the same shape, on several threads: most of the time is spent on fresh memory."""
    in_parts(lambda part: np.copyto(target[part], source[part]), target)


def in_parts(function: Callable[[slice], Any], array: np.ndarray) -> list[Any]:
    """Return the results of function(slice of the first axis) for slices that cover a large array, in their order."""
    if array.size < 2 * _PART or _THREADS == 1:
        return [function(slice(None))]
    length = max(1, len(array) * _PART // array.size)
    parts = [slice(start, start + length) for start in range(0, len(array), length)]
    return list(_threads().map(function, parts))


@functools.cache
def _threads() -> concurrent.futures.ThreadPoolExecutor:
    return concurrent.futures.ThreadPoolExecutor(_THREADS)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked process has none of its parent's threads
