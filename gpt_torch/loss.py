"""Cross-entropy of the model's logits, summed or averaged over the targets that count."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_torch.model import GPTModel
from parity.config import IGNORE_INDEX


def summed_loss(model: GPTModel, inputs: Tensor, targets: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: Token ids [B, T]; positions with IGNORE_INDEX are left out.
        compute_dtype: Compute in this dtype, from a temporary cast of the parameters; by default in theirs.
    """
    cast = {} if compute_dtype is None else {name: p.to(compute_dtype) for name, p in model.named_parameters()}
    logits = torch.func.functional_call(model, cast, inputs)  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")


def calc_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per target that is not ignored; the arguments are summed_loss's."""
    return summed_loss(model, inputs, targets) / (targets != IGNORE_INDEX).sum()
