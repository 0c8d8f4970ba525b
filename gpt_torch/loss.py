"""Cross-entropy of the model's logits; gpt_jax/loss.py has the same functions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_torch.model import GPTModel
from gpt_torch.modes import unwrap, values
from parity.config import IGNORE_INDEX, is_counted


def summed_loss(model: GPTModel, inputs: Tensor, targets: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]. Targets -1 and -100 are ignored; any other target outside the
            vocabulary makes the loss and its gradients NaN, because a compiled function cannot raise.
        compute_dtype: Dtype of the computation, to which the parameters are cast temporarily; by default their own.

    Returns:
        A scalar of dtype float32 or float64.
    """
    if compute_dtype is None:
        logits = model(inputs)  # [B, T, V]
    else:
        inner = unwrap(model)
        cast = {name: p.to(compute_dtype) for name, p in inner.named_parameters()}
        logits = torch.func.functional_call(inner, cast, inputs)  # [B, T, V]
    counted = is_counted(targets)
    valid = counted & (targets >= 0) & (targets < unwrap(model).config.n_vocab)
    known = torch.where(valid, targets, IGNORE_INDEX)
    loss = F.cross_entropy(logits.flatten(0, 1), known.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss * torch.where((counted & ~valid).any(), torch.nan, 1.0)


def calc_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per target that is not ignored.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]; -1 and -100 are ignored.

    Raises:
        InputError: For any other target outside the vocabulary. Under torch.compile the loss is NaN instead.
    """
    known_targets = values(targets)
    if known_targets is not None:
        unwrap(model).config.check_targets(known_targets)
    return summed_loss(model, inputs, targets) / is_counted(targets).sum()
