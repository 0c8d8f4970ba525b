"""NumPy arrays into and out of the Flax model, through the table in parity/weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity import weights

if TYPE_CHECKING:
    from gpt_jax.model import GPTModel


def parameters(model: "GPTModel") -> dict[str, nnx.Param]:
    """{flax name of the table: parameter}."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def load_weights(
    model: "GPTModel", arrays: Mapping[str, Any], format: str = "huggingface", origin: str = "weights"
) -> None:
    """Put arrays, named as in `format`, in place of the model's parameters, in the parameters' dtype.

    Raises InputError that lists every missing, unknown or wrongly shaped name.
    """
    found = parameters(model)
    new = {}
    for name, array in weights.convert(arrays, format, "flax", model.config, origin=origin):
        weights.warn_if_not_finite(name, array, origin)
        new[name] = jnp.asarray(array, dtype=found[name].get_value().dtype).block_until_ready()
        del array  # a stack of layers is large: never hold two
    nnx.update(model, nnx.from_flat_state([(tuple(name.split(".")), nnx.Param(value)) for name, value in new.items()]))


def export_weights(model: "GPTModel", format: str = "huggingface") -> dict[str, np.ndarray]:
    """The model's parameters as NumPy arrays, named and oriented as in `format`."""
    arrays = {name: np.asarray(parameter.get_value()) for name, parameter in parameters(model).items()}
    return dict(weights.convert(arrays, "flax", format, model.config))
