"""Copying NumPy arrays into and out of a PyTorch model, by the table in parity/weights."""

from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, nn

from gpt_torch.modes import require_values, unwrap
from parity import weights
from parity.errors import InputError
from parity.weights import Row


def load_weights(
    model: nn.Module, arrays: Mapping[str, Any], format: str = "huggingface", origin: str = "weights"
) -> None:
    """Copy arrays into the model's parameters, converted to the parameters' dtype.

    Args:
        model: A `GPTModel`, which is changed in place; torch.compile and DataParallel may have wrapped it.
        arrays: {name: array} in the naming and layout of `format`.
        format: One of `parity.weights.FORMATS`.
        origin: Where the arrays come from, for error messages.

    Raises:
        InputError: For missing and unknown names and wrong shapes; the message lists all of them. Also for a model
            without memory (on the meta device).
    """
    copy_arrays(unwrap(model), arrays, format, origin)


def copy_arrays(
    model: Any, arrays: Mapping[str, Any], format: str, origin: str, table: Sequence[Row] | None = None
) -> None:
    """Copy arrays into the parameters of the rows of a table, by default all of the model's; see load_weights."""
    require_values(model)
    parameters = dict(model.named_parameters())
    if not torch.is_inference_mode_enabled() and any(p.is_inference() for p in parameters.values()):
        raise InputError("a model that was made under torch.inference_mode can be changed only there; make it outside")
    with torch.no_grad():
        for name, array in weights.convert(arrays, format, "torch", model.config, origin=origin, table=table):
            weights.warn_if_not_finite(name, array, origin)
            if array.dtype == ml_dtypes.bfloat16:  # torch cannot read this NumPy dtype
                array = array.astype(np.float32)
            parameters[name].copy_(torch.from_numpy(np.require(array, requirements=["W"])))


def export_weights(model: nn.Module, format: str = "huggingface") -> dict[str, np.ndarray]:
    """Return the parameters of a model as NumPy arrays, which load_weights() of either backend takes.

    Args:
        model: A `GPTModel`.
        format: The naming and layout, one of `parity.weights.FORMATS`.

    Returns:
        {name: array} in the dtype of the parameters; `parity.weights.shapes` has the names and shapes.

    Raises:
        InputError: If the model has adapters or a classification head, which would be lost.
    """
    gpt: Any = unwrap(model)
    if getattr(gpt, "lora", None) is not None:
        raise InputError("the model has an adapter: merge() it first, or write it alone with save_adapter()")
    if getattr(gpt, "classifier", None) is not None:
        raise InputError("the model is a classifier; write it with save_classifier()")
    return export_arrays(gpt, format)


def export_arrays(model: Any, format: str, table: Sequence[Row] | None = None) -> dict[str, np.ndarray]:
    """Return the parameters of the rows of a table, by default all of the model's; see export_weights."""
    require_values(model)
    parameters = dict(model.named_parameters())
    arrays = {name: to_numpy(parameters[name]) for name in weights.shapes(model.config, "torch", table)}
    return dict(weights.convert(arrays, "torch", format, model.config, table=table))


def to_numpy(x: Tensor) -> np.ndarray:
    """Return a tensor as a NumPy array of the same dtype; bfloat16 becomes that of ml_dtypes, as in JAX."""
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
