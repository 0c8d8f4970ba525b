"""Copying NumPy arrays into and out of a Flax model, by the table in parity/weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from parity import weights
from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import Row


def config_of(model: Any) -> GPTConfig:
    """Return the configuration of a GPTModel or DecodingModel; raise InputError for any other object."""
    config = getattr(model, "config", None)
    if not isinstance(model, nnx.Module) or not isinstance(config, GPTConfig):
        raise InputError(f"model: a gpt_jax.GPTModel is needed, got {type(model).__module__}.{type(model).__name__}")
    return config


def floating_dtype(dtype: Any) -> Any:
    """The floating-point dtype of this name; raises InputError for others, and for float64 without jax_enable_x64."""
    try:
        known = None if dtype is None else jnp.dtype(dtype)  # NumPy takes None for float64
    except TypeError:
        known = None
    if known is None:
        raise InputError(f"dtype {dtype!r:.60} is unknown; give float32, bfloat16, float16 or float64")
    if not jnp.issubdtype(known, jnp.floating):
        raise InputError(f"dtype {known}: a model needs a floating-point dtype, such as float32 or bfloat16")
    if jax.dtypes.canonicalize_dtype(known) != known:
        raise InputError(f"dtype {known} needs jax_enable_x64; without it JAX would compute in float32")
    return known


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
    config_of(model)
    copy_arrays(model, arrays, format, origin)


def copy_arrays(
    model: Any, arrays: Mapping[str, Any], format: str, origin: str, table: Sequence[Row] | None = None
) -> None:
    """Replace the parameters of the rows of a table, by default all of the model's; see load_weights."""
    current = {name: parameter.get_value() for name, parameter in parameters(model).items()}
    loaded = {}
    for name, array in weights.convert(arrays, format, "flax", model.config, origin=origin, copy=True, table=table):
        weights.warn_if_not_finite(name, array, origin)
        loaded[name] = nnx.Param(jax.block_until_ready(_like(array, current[name])))
        del array  # a stack of layers is large, so never hold two
    nnx.update(model, nnx.from_flat_state([(tuple(name.split(".")), parameter) for name, parameter in loaded.items()]))


def _like(array: np.ndarray, current: Any) -> Any:
    """A new array in the dtype of a parameter, and on its devices if it was put there (committed); not copied if both
    are possible without it."""
    is_concrete = isinstance(current, Array) and not isinstance(current, jax.core.Tracer)
    if is_concrete and current.committed:
        return jax.device_put(np.asarray(array, current.dtype), current.sharding)
    return jax.device_put(np.asarray(array, current.dtype), may_alias=True)


def export_weights(model: nnx.Module, format: str = "huggingface") -> dict[str, np.ndarray]:
    """Return the parameters of a model as NumPy arrays, which load_weights() of either backend takes.

    Args:
        model: A `GPTModel`.
        format: The naming and layout, one of `parity.weights.FORMATS`.

    Returns:
        {name: array} in the dtype of the parameters; `parity.weights.shapes` has the names and shapes.

    Raises:
        InputError: If the model has adapters or a classification head, which would be lost.
    """
    config_of(model)  # raises for another class
    if getattr(model, "lora", None) is not None:
        raise InputError("the model has an adapter: merge() it first, or write it alone with save_adapter()")
    if getattr(model, "classifier", None) is not None:
        raise InputError("the model is a classifier; write it with save_classifier()")
    return export_arrays(model, format)


def export_arrays(model: Any, format: str, table: Sequence[Row] | None = None) -> dict[str, np.ndarray]:
    """Return the parameters of the rows of a table, by default all of the model's; see export_weights."""
    values = parameters(model)
    arrays = {name: _to_numpy(name, values[name].get_value()) for name in weights.shapes(model.config, "flax", table)}
    return dict(weights.convert(arrays, "flax", format, model.config, table=table))


def _to_numpy(name: str, array: Any) -> np.ndarray:
    if isinstance(array, jax.core.Tracer | jax.ShapeDtypeStruct):
        raise InputError(
            f"the model's parameter {name} has no values: it is traced (by jax.jit, jax.vmap, ...) or abstract "
            "(from jax.eval_shape); export the weights outside of the traced function"
        )
    return np.asarray(array)
