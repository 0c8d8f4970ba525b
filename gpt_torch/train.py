"""Training in PyTorch: the loss. The trainer follows."""

from torch import Tensor
from torch.nn import functional as F

from gpt_torch.model import GPTModel
from parity.data import NO_TARGET


def loss_sum(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, summed over the targets [B, T] that are not NO_TARGET."""
    logits = model(inputs)  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")


def calc_loss(model: GPTModel, inputs: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy in nats, the mean over the targets [B, T] that are not NO_TARGET."""
    return loss_sum(model, inputs, targets) / (targets != NO_TARGET).sum()
