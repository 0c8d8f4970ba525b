"""Weights that torch.save wrote, read with PyTorch's `weights_only=True`: nothing in such a file is executed."""

import functools
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from parity.errors import InputError, install_extras, printable
from parity.weights.lazy import LazyTensor

# Under which key programs store the weights beside the optimizer's state: the notebook, Lightning, nanoGPT.
_NESTED = ("model_state_dict", "state_dict", "model")
# The dtype that each dtype of PyTorch is read as.
_DTYPES: dict[str, np.dtype] = {
    "float64": np.dtype("f8"),
    **dict.fromkeys(("float32", "float16", "bfloat16"), np.dtype("f4")),
}


def read_pickle(path: Path, rename: Callable[[Iterable[str]], dict[str, str]]) -> dict[str, LazyTensor]:
    """Read the state dict in a file of torch.save, which may be nested beside an optimizer's state.

    Args:
        path: The file.
        rename: Returns {name: name in the file} of the tensors to read, given the names in the file.

    Returns:
        {name: tensor}. A tensor is read when it is used; 16-bit floats become float32.

    Raises:
        InputError: If PyTorch is not installed, the file is damaged or holds anything but tensors and plain values, or
            one of these tensors does not hold floating-point numbers.
    """
    try:
        import torch
    except ModuleNotFoundError:
        raise InputError(f"{path} is a file of PyTorch, which is not installed: {install_extras('torch')}") from None
    try:
        content = torch.load(path, "cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # a damaged pickle fails with whatever its bytes lead to
        reason = printable((str(error) or type(error).__name__).partition("\n")[0], 200)
        raise InputError(f"{path} cannot be read with weights_only=True ({reason}); save a state_dict") from None
    for key in _NESTED:
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise InputError(f"{path} holds no state_dict; save the model's with torch.save(model.state_dict(), PATH)")
    tensors = {str(name): tensor for name, tensor in content.items()}
    return {name: _lazy(name, tensors[stored], path) for name, stored in rename(tensors).items()}


def _lazy(name: str, tensor: Any, path: Path) -> LazyTensor:
    where = f"{path}: {printable(name, 120)}"
    kind = str(tensor.dtype).removeprefix("torch.")
    if kind not in _DTYPES:
        raise InputError(f"{where} has dtype {kind}; weights must be one of {', '.join(_DTYPES)}")
    if str(tensor.layout) != "torch.strided" or tensor.device.type != "cpu":
        raise InputError(f"{where} is not a dense tensor with values")
    if tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        raise InputError(f"{where} has fewer values than its shape {list(tensor.shape)} says")
    return LazyTensor(name, tuple(tensor.shape), _DTYPES[kind], functools.partial(_read, tensor))


def _read(tensor: Any) -> np.ndarray:
    tensor = tensor.detach()
    return (tensor.float() if tensor.element_size() == 2 else tensor).numpy()
