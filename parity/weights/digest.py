"""The sha256 of weights, by which two models are known to be the same, whatever file or framework holds them."""

import hashlib
from collections.abc import Mapping

import numpy as np


def sha256_of(arrays: Mapping[str, np.ndarray]) -> str:
    """Return the sha256 of names, dtypes, shapes and values of arrays, in the order of their names.

    Args:
        arrays: The weights, in one of the formats; each format has a sha256 of its own.
    """
    digest = hashlib.sha256()
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).view(np.uint8).data)
    return digest.hexdigest()
