"""Looking inside a model: named activations, read or replaced. The names: parity/taps.py."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from gpt_torch.model import GPTModel
from parity import taps


def run_with_cache(
    model: GPTModel,
    tokens: Tensor,
    names: Iterable[str] | str | None = None,
    patches: Mapping[str, taps.Patch] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """tokens int [B, T] -> (logits [B, T, V], {name: activation}), without dropout in a model that has none on.

    `names`: all by default; "blocks.*.attn.pattern" is that of every layer. `patches`: {name: what takes the
    activation's place, or a function of it}; the cache then has what was put there. Scores and patterns exist
    only in the explicit attention, which runs for them, with a warning where the model has another. Raises
    InputError for unknown names and for patches of the wrong shape.
    """
    return taps.run(model, tokens, names, patches, _like)


def run_with_patches(model: GPTModel, tokens: Tensor, patches: Mapping[str, taps.Patch]) -> Tensor:
    """Logits [B, T, V] of a run in which activations are replaced: see run_with_cache."""
    return run_with_cache(model, tokens, (), patches)[0]


def _like(value: taps.Patch, x: Tensor) -> Tensor:
    return torch.as_tensor(value).to(x).expand_as(x)
