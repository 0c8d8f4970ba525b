"""Copying NumPy arrays into and out of a Flax model, by the table in parity/weights."""

from collections.abc import Mapping
from typing import Any, cast

import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity import weights
from parity.errors import InputError


def parameters(model: nnx.Module) -> dict[str, nnx.Param]:
    """Return {name: parameter}, with the names that the table has for Flax.

    Raises InputError for a DecodingModel, whose weights are arranged in another way.
    """
    if not hasattr(model, "trf_blocks"):
        raise InputError("a model from for_decoding() can only generate; use the GPTModel that it was made from")
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def load_weights(
    model: nnx.Module, arrays: Mapping[str, Any], format: str = "huggingface", origin: str = "weights"
) -> None:
    """Replace the model's parameters by arrays, converted to the parameters' dtype.

    Args:
        model: A `GPTModel`; it is changed in place.
        arrays: {name: array} in the naming and layout of `format`.
        format: One of `parity.weights.FORMATS`.
        origin: Where the arrays come from, for error messages.

    Raises:
        InputError: For missing and unknown names and wrong shapes; the message lists all of them.
    """
    config = cast(Any, model).config  # Any, because model.py imports this module
    dtypes = {name: parameter.get_value().dtype for name, parameter in parameters(model).items()}
    loaded = {}
    for name, array in weights.convert(arrays, format, "flax", config, origin=origin):
        weights.warn_if_not_finite(name, array, origin)
        loaded[name] = nnx.Param(jnp.asarray(array, dtype=dtypes[name]).block_until_ready())
        del array  # a stack of layers is large, so never hold two
    nnx.update(model, nnx.from_flat_state([(tuple(name.split(".")), parameter) for name, parameter in loaded.items()]))


def export_weights(model: nnx.Module, format: str = "huggingface") -> dict[str, np.ndarray]:
    """Return the parameters of a `GPTModel` as NumPy arrays, in the naming and layout of `format`."""
    config = cast(Any, model).config  # Any, because model.py imports this module
    arrays = {name: np.asarray(parameter.get_value()) for name, parameter in parameters(model).items()}
    return dict(weights.convert(arrays, "flax", format, config))
