"""The converter between weight formats, by the table (parity/weights/table.py), and a check of the values."""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from parity.arrays import aligned_empty, copy_into, in_parts
from parity.config import GPTConfig
from parity.weights.table import Row, check, check_dtype, rows, shapes


def convert(
    weights: Mapping[str, Any],
    from_format: str,
    to_format: str,
    config: GPTConfig,
    dtype: Any = None,
    origin: str = "weights",
    copy: bool = False,
    table: Sequence[Row] | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    """Convert the weights of a model from one format to another.

    The largest tensors come first and each tensor is read once, so that a caller that drops each array after use
    never holds the model twice.

    Args:
        weights: {name: array}; values may be lazy (anything that np.asarray reads).
        from_format: The format of `weights`, one of FORMATS.
        to_format: The format of the result.
        config: Configuration of the model.
        dtype: Dtype of the result; None keeps the dtype of each tensor.
        origin: Where the weights come from, for messages.
        copy: Whether each array is a new one, at an address that is a multiple of 64.
        table: The rows to convert, if they are not all of the model's: a part of it, or its adapters.

    Yields:
        (name, array) of each tensor, with the names and shapes of `shapes` and the dtype of `dtype`; without `copy`,
        arrays may be views of the given ones.

    Raises:
        InputError: If names or shapes do not fit the model (see `check`), a tensor does not hold floating-point
            numbers, or `to_format` cannot hold the model.
    """
    table = rows(config) if table is None else table
    check({name: tuple(array.shape) for name, array in weights.items()}, config, from_format, origin, table)
    for name, array in weights.items():
        check_dtype(name, array.dtype, origin)
    sizes = {name: math.prod(shape) for name, shape in shapes(config, to_format, table).items()}
    for row in sorted(table, key=lambda row: -sizes[row.names(to_format, config)[0]]):
        names = row.names(to_format, config)
        arrays = _arrays(row, weights, from_format, to_format, config, dtype)
        if row.stacked(to_format) and not row.stacked(from_format):
            yield names[0], _stack(arrays, len(row.layer_numbers(config)))
        else:
            for name in names:
                yield name, _copied(next(arrays)) if copy else next(arrays)


def _arrays(
    row: Row, weights: Mapping[str, Any], from_format: str, to_format: str, config: GPTConfig, dtype: Any
) -> Iterator[np.ndarray]:
    """Yield a row's tensors in the target's axes, or one stack if both formats stack; no two are held at once."""
    both_stacked = row.stacked(from_format) and row.stacked(to_format)
    pattern = " -> ".join(row.pattern(f) if both_stacked else row.axes[f] for f in (from_format, to_format))
    known = {**config.axes, **row.sizes, "L": len(row.layer_numbers(config))}
    sizes = {letter: size for letter, size in known.items() if letter in pattern}

    def convert_array(array: Any) -> np.ndarray:
        converted = rearrange(np.asarray(array), pattern, **sizes)
        return converted if dtype is None else converted.astype(dtype, copy=False)

    for name in row.names(from_format, config):
        if row.stacked(from_format) and not both_stacked:
            stack = np.asarray(weights[name])
            for layer_array in stack:
                yield convert_array(layer_array)
        else:
            yield convert_array(weights[name])


def _stack(arrays: Iterator[np.ndarray], n_layer: int) -> np.ndarray:
    """Stack the arrays of all layers, holding one of them at a time."""
    first = next(arrays)
    stacked = aligned_empty((n_layer, *first.shape), first.dtype)
    copy_into(stacked[0], first)
    del first
    for layer in range(1, n_layer):
        copy_into(stacked[layer], next(arrays))
    return stacked


def _copied(array: np.ndarray) -> np.ndarray:
    copy = aligned_empty(array.shape, array.dtype)
    copy_into(copy, array)
    return copy


def warn_if_not_finite(name: str, array: np.ndarray, origin: str) -> None:
    """Warn of a tensor that has NaN or infinite values.

    Args:
        name: Name of the tensor, for the warning.
        array: The tensor: floating-point numbers of any dtype and any shape.
        origin: Where it comes from, for the warning.
    """
    if array.flags.f_contiguous:
        array = array.T  # of which slices are contiguous
    # A sum of finite numbers may overflow; one with NaN or infinity is never finite.
    if not np.isfinite(sum(in_parts(lambda part: array[part].sum(dtype=np.float64), array))):
        count = array.size - int(np.isfinite(array).sum())
        if count:
            warnings.warn(f"{origin}: {name} has {count} values that are not finite", stacklevel=3)
