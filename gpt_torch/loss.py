"""Cross-entropy of the model's logits; gpt_jax/loss.py has the same functions."""

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_torch.model import GPTModel
from gpt_torch.modes import unwrap, values
from parity.config import IGNORE_INDEX, is_counted
from parity.training.objective import count_targets


def summed_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]. Targets -1 and -100 are ignored; any other target outside the
            vocabulary makes the loss and its gradients NaN, because a compiled function cannot raise.

    Returns:
        A scalar of dtype float32 or float64.
    """
    return cross_entropy(model(inputs), targets)


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Return summed_loss() for the logits [B, T, V] of a model."""
    known, factor = known_targets(targets, logits.shape[-1])
    loss = F.cross_entropy(logits.flatten(0, 1), known.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return loss * factor


def known_targets(targets: Tensor, n_vocab: int) -> tuple[Tensor, Tensor]:
    """Return the targets with IGNORE_INDEX wherever they are no id, and the factor of the loss: NaN if one is invalid,
    that is, neither an id nor ignored, otherwise 1.
    """
    counted = is_counted(targets)
    valid = counted & (targets >= 0) & (targets < n_vocab)
    return torch.where(valid, targets, IGNORE_INDEX), torch.where((counted & ~valid).any(), torch.nan, 1.0)


def calc_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats per target that is not ignored.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]; -1 and -100 are ignored.

    Raises:
        InputError: For any other target outside the vocabulary. Under torch.compile the loss is NaN instead.
    """
    ids = values(targets)
    if ids is not None:
        unwrap(model).config.check_targets(ids)
    return summed_loss(model, inputs, targets) / count_targets(targets)
