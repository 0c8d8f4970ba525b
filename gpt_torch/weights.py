"""NumPy arrays into and out of the torch model, through the table in parity/weights."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import torch
from torch import Tensor

from parity import weights

if TYPE_CHECKING:
    from gpt_torch.model import GPTModel


def load_weights(
    model: "GPTModel", arrays: Mapping[str, Any], format: str = "huggingface", origin: str = "weights"
) -> None:
    """Copy arrays, named as in `format`, over the model's parameters, in the parameters' dtype.

    Raises InputError that lists every missing, unknown or wrongly shaped name.
    """
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, array in weights.convert(arrays, format, "torch", model.config, origin=origin):
            weights.warn_if_not_finite(name, array, origin)
            if array.dtype == ml_dtypes.bfloat16:  # torch cannot read this NumPy dtype
                array = array.astype(np.float32)
            parameters[name].copy_(torch.from_numpy(np.require(array, requirements=["C", "W"])))


def export_weights(model: "GPTModel", format: str = "huggingface") -> dict[str, np.ndarray]:
    """The model's parameters as NumPy arrays, named and oriented as in `format`."""
    arrays = {name: to_numpy(parameter) for name, parameter in model.named_parameters()}
    return dict(weights.convert(arrays, "torch", format, model.config))


def to_numpy(x: Tensor) -> np.ndarray:
    """A tensor's values as a NumPy array of the same dtype; bfloat16 is that of ml_dtypes, as in JAX."""
    x = x.detach().cpu()
    return x.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if x.dtype == torch.bfloat16 else x.numpy()
