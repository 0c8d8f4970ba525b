"""Models under PyTorch's wrappers and modes: torch.compile, DataParallel, torch.func, fake and meta tensors."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from parity.config import GPTConfig
from parity.errors import InputError


def unwrap(model: Any) -> Any:
    """Return the GPTModel inside the wrappers of torch.compile, DataParallel or AveragedModel; or the model itself.

    Raises:
        InputError: If it is not a GPTModel.
    """
    inner: Any = model
    while (wrapped := getattr(inner, "_orig_mod", getattr(inner, "module", None))) is not None:
        inner = wrapped
    if not isinstance(inner, nn.Module) or not isinstance(getattr(inner, "config", None), GPTConfig):
        raise InputError(f"model: a gpt_torch.GPTModel is needed, got {type(model).__module__}.{type(model).__name__}")
    return inner


def values(tensor: Tensor) -> Tensor | None:
    """Return the tensor without the wrappers of torch.func, or None if it has no values.

    A tensor has no values on the meta device, under FakeTensorMode, and while a function is compiled or exported.
    """
    if torch.compiler.is_compiling():
        return None
    tensor = torch.func.debug_unwrap(tensor)
    try:
        float(tensor.detach()[(slice(1),) * tensor.ndim].sum())
    except RuntimeError:
        return None
    return tensor


def require_values(model: nn.Module) -> None:
    """Raise InputError if a parameter has no values to read or replace."""
    for name, parameter in model.named_parameters():
        if values(parameter) is None:
            raise InputError(
                f"the model's parameter {name} has no values: it is on the meta device, fake or traced; "
                'use a model with memory, for example model.to_empty(device="cpu")'
            )


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Within this context all modules are in eval mode; afterwards the mode of each is restored."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def check_ids(tokens: Tensor, config: GPTConfig) -> None:
    """Raise InputError for an id outside the vocabulary, unless the ids have no values (see `values`)."""
    if torch.compiler.is_compiling():
        return
    try:  # one transfer, for which the host waits
        low, high = torch.stack(torch.func.debug_unwrap(tokens).aminmax()).tolist()
    except RuntimeError:
        return
    config.check_tokens(tokens.shape, low, high)
