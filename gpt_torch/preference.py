"""Direct preference optimization (Rafailov et al. 2023); gpt_jax/preference.py has the same functions.

A row of a batch is a pair of texts, the chosen one and then the rejected one, both padded to T positions. The loss of a
pair is -log sigmoid(beta * margin), where the margin is how much further the log-probability of the chosen response has
risen above that of the reference than the log-probability of the rejected response has.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from gpt_torch.loss import known_targets
from gpt_torch.model import GPTModel
from parity.config import IGNORE_INDEX, is_counted
from parity.training.objective import Objective, Reduction, is_pair


def pair_logprobs(model: GPTModel, inputs: Tensor, targets: Tensor, reduction: Reduction = "sum") -> Tensor:
    """Return the log-probability in nats that the model gives to the targets of each text.

    Args:
        model: The model.
        inputs: Token ids, integers [B, 2T]: the chosen text, then the rejected one.
        targets: The ids to predict, integers [B, 2T]. Targets -1 and -100 are ignored; any other target outside the
            vocabulary makes the result NaN, because a compiled function cannot raise.
        reduction: "sum" over the targets of a text, as in the paper, or their "mean".

    Returns:
        [B, 2], chosen and rejected, of dtype float32 or float64; 0 for a text without targets.
    """
    ids, targets = (tokens.unflatten(1, (2, -1)).flatten(0, 1) for tokens in (inputs, targets))  # [2B, T]
    logits = model(ids)  # [2B, T, V]
    known, factor = known_targets(targets, logits.shape[-1])
    losses = F.cross_entropy(logits.flatten(0, 1), known.flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    sums = -losses.unflatten(0, targets.shape).sum(dim=1)  # [2B]
    if reduction == "mean":
        sums = sums / is_counted(targets).sum(dim=1).clamp(min=1)
    return (sums * factor).unflatten(0, (-1, 2))


def preference_losses(logprobs: Tensor, reference: Tensor, beta: float) -> Tensor:
    """Return the loss of each pair in nats.

    Args:
        logprobs: The model's log-probabilities [B, 2] of the chosen and the rejected texts.
        reference: Those of the reference, [B, 2].
        beta: How strongly the loss holds the model to the reference.

    Returns:
        [B]; ln 2 where both are the same.
    """
    margins = (logprobs[:, 0] - logprobs[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -F.logsigmoid(beta * margins)


def preference(beta: float, reduction: Reduction = "sum") -> Objective:
    """Return the objective, whose batches are (inputs [B, 2T], targets [B, 2T], reference [B, 2]); see above.

    Args:
        beta: See preference_losses().
        reduction: See pair_logprobs(); the reference's log-probabilities have the same.
    """

    def rows(model: GPTModel, inputs: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        return pair_logprobs(model, inputs, targets, reduction)

    def summed_loss(model: GPTModel, inputs: Tensor, targets: Tensor, reference: Tensor) -> Tensor:
        losses = preference_losses(rows(model, inputs, targets, reference), reference, beta)
        return torch.where(is_pair(targets), losses, 0).sum()

    return Objective(summed_loss, lambda targets: is_pair(targets).sum(), rows=rows)
