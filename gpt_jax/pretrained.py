"""Weights into and out of the Flax model, through the table in parity/weights.py."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from parity import huggingface, notebook, pretrained, weights
from parity.config import as_tied

if TYPE_CHECKING:
    from gpt_jax.model import GPTModel


def parameters(model: "GPTModel") -> dict[str, nnx.Param]:
    """{flax name of the table: parameter}."""
    return {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model, nnx.Param))}


def load_weights(
    model: "GPTModel", arrays: Mapping[str, Any], source: str = "huggingface", origin: str = "weights"
) -> None:
    """Put arrays, named as in `source`, in place of the model's parameters, in the parameters' dtype.

    Raises InputError that lists every missing, unknown or wrongly shaped name.
    """
    found = parameters(model)
    new = {}
    for name, array in weights.convert(arrays, source, "flax", model.config, origin=origin):
        weights.warn_if_not_finite(name, array, origin)
        new[name] = jnp.asarray(array, dtype=found[name].get_value().dtype).block_until_ready()
        del array  # a stack of layers is large: never hold two
    nnx.update(model, nnx.from_flat_state([(tuple(name.split(".")), nnx.Param(value)) for name, value in new.items()]))


def load_weights_into_gpt(model: "GPTModel", params: dict[str, Any]) -> None:
    """The notebook's function: OpenAI's weights, nested as download_and_load_gpt2 returns them, into a model.

    A head of its own becomes a copy of the embedding. Raises InputError for a model of another shape.
    """
    arrays = dict(weights.convert(notebook.flatten(params), "openai", "huggingface", as_tied(model.config)))
    if not model.config.tied_head:
        arrays["lm_head.weight"] = arrays["wte.weight"]
    load_weights(model, arrays, origin="params")


def export_weights(model: "GPTModel", target: str = "huggingface") -> dict[str, np.ndarray]:
    """The model's parameters as NumPy arrays, named and oriented as in `target`."""
    arrays = {name: np.asarray(parameter.get_value()) for name, parameter in parameters(model).items()}
    return dict(weights.convert(arrays, "flax", target, model.config))


def save_pretrained(model: "GPTModel", folder: str | Path) -> None:
    """Write config.json and model.safetensors, which load_pretrained of either backend and transformers open."""
    huggingface.write(Path(folder), model.config, export_weights(model))


def load_pretrained(path: str | Path, **options: Any) -> "GPTModel":
    """The model in a folder, or one of OpenAI's by its size ("124M"); `options` go to GPTModel.

    A size is downloaded into the cache where it is not there yet. A folder holds OpenAI's original files,
    is one saved by transformers, or is one of our checkpoints.
    """
    from gpt_jax.model import GPTModel

    config, arrays, source = pretrained.read(path)
    # Abstract first: the zeros that the constructor makes are never allocated.
    model = nnx.eval_shape(lambda: GPTModel(config, seed=None, **options))
    load_weights(model, arrays, source, origin=str(path))
    return model
