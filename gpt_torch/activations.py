"""Reading and replacing named activations. Their names are listed in parity/taps."""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch import Tensor

from gpt_torch.model import GPTModel
from gpt_torch.modes import unwrap
from parity import taps
from parity.arrays import as_numpy


def run_with_cache(
    model: GPTModel,
    tokens: Tensor,
    names: Iterable[str] | str | None = None,
    patches: Mapping[str, taps.Patch] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Run a model, record activations and, with `patches`, replace some.

    Args:
        model: A `GPTModel`; if torch.compile or DataParallel wrapped it, the model itself runs. Dropout is applied if
            the model is in training mode.
        tokens: Integer ids [B, T].
        names: Activations to record; `*` matches any text, as in "blocks.*.attn.pattern". All by default. Scores and
            patterns exist in the explicit attention only, which then runs in place of a fused one, with a warning.
        patches: For each name or pattern a function of the activation, or an array that broadcasts to its shape.

    Returns:
        (logits, cache): logits [B, T, V], float32 (float64 if the parameters are), and {name: activation}. A replaced
        activation is recorded as its replacement. `parity.taps.AXES` has the axes of each activation; its dtype is
        that of the parameters, and float32 at least for scores and logits.

    Raises:
        InputError: For names that the model does not have, for two patches of one activation, and for a patch of
            the wrong shape.
    """
    return taps.run(unwrap(model), tokens, names, patches, _broadcast)


def run_with_patches(model: GPTModel, tokens: Tensor, patches: Mapping[str, taps.Patch]) -> Tensor:
    """Run a model with some activations replaced.

    Args:
        model: A `GPTModel`.
        tokens: Integer ids [B, T].
        patches: For each name or pattern a function of the activation, or an array that broadcasts to its shape.

    Returns:
        Logits [B, T, V], float32 (float64 if the parameters are).

    Raises:
        InputError: For names that the model does not have, for two patches of one activation, and for a patch of
            the wrong shape.
    """
    return run_with_cache(model, tokens, (), patches)[0]


def _broadcast(value: taps.Patch, x: Tensor) -> Tensor:
    if not isinstance(value, Tensor):
        value = torch.from_numpy(np.array(as_numpy(value, np.float64 if x.dtype == torch.float64 else np.float32)))
    return value.to(x).expand_as(x)
