"""The sha256 of weights, by which two models are known to be the same, whatever file or framework holds them."""

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from parity.config import GPTConfig
from parity.weights.conversion import convert


def weights_sha256(config: GPTConfig, arrays: Mapping[str, Any], format: str = "huggingface") -> str:
    """Return a hash of a model's weights as float32, which does not depend on their format or their files.

    Args:
        config: Configuration of the model.
        arrays: The weights, {name: array}.
        format: Their format, one of parity.weights.FORMATS.

    Raises:
        InputError: If names or shapes do not fit the model.
    """
    digest = hashlib.sha256()
    converted = convert(arrays, format, "huggingface", config, np.float32)
    for name, part in sorted((name, _sha256(array)) for name, array in converted):
        digest.update(f"{name} {part}\n".encode())
    return digest.hexdigest()


def _sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array, "<f4").view(np.uint8).data).hexdigest()
