"""The loss of rows that hold several examples (parity/tuning/packing.py); gpt_jax/packing.py is its twin."""

import torch
from torch import Tensor

from gpt_torch.loss import cross_entropy
from gpt_torch.model import GPTModel, head_logits
from gpt_torch.modes import unwrap
from parity import taps
from parity.errors import check_choice
from parity.taps import tap
from parity.training.objective import Objective


def packed_loss(model: GPTModel, inputs: Tensor, targets: Tensor, segments: Tensor) -> Tensor:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    It equals that of summed_loss() for the same examples, each in a row of its own.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]; see summed_loss.
        segments: The number of each position's example, integers [B, T]; the positions of an example are consecutive.

    Returns:
        A scalar of dtype float32 or float64.

    Raises:
        InputError: If the model's attention is a fused kernel, which knows no segments.
    """
    return cross_entropy(head_logits(model, packed_hidden(model, inputs, segments)), targets)


def packed_hidden(model: GPTModel, tokens: Tensor, segments: Tensor) -> Tensor:
    """Return the input of the output head, [B, T, D]; see packed_loss.

    A position attends to those before it in its segment, and counts from the beginning of the segment.
    """
    model = unwrap(model)
    check_choice("attention, for packed rows,", model.attention, ["explicit"])
    slots = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
    begins = segments != torch.cat([segments[:, :1] - 1, segments[:, :-1]], dim=1)  # [B, T]
    positions = slots - torch.where(begins, slots, 0).cummax(dim=1).values  # [B, T]
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, S]
    mask = (same & (slots[None, :] <= slots[:, None]))[:, None]  # [B, 1, T, S]
    x = model.tok_emb(tokens) + model.pos_emb(positions)  # [B, T, D]
    x = tap("embed", model.drop_emb(x))  # [B, T, D]
    for number, block in enumerate(model.trf_blocks):
        taps.layer(number)
        x = block(x, mask)  # [B, T, D]
    taps.layer(None)
    return tap("ln_f", model.final_norm(x))  # [B, T, D]


PACKED = Objective(packed_loss)
