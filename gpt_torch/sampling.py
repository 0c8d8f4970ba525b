"""From logits to a token in PyTorch, by the rules of parity/sampling.py; gpt_jax/sampling.py has the same."""

import torch
from torch import Tensor

from parity.sampling import ActiveRules, RowOptions


def choose(logits: Tensor, seen: Tensor | None, u: Tensor, options: RowOptions, active: ActiveRules) -> Tensor:
    """Choose a token for each row.

    Args:
        logits: float [B, V].
        seen: bool [B, V], the tokens that are already in each row; needed for a repetition penalty only.
        u: float32 [B], uniform random numbers in [0, 1).
        options: Tensors [B].
        active: The rules that at least one row uses.

    Returns:
        Token ids, int64 [B].
    """
    if active.repetition_penalty and seen is not None:
        logits = apply_repetition_penalty(logits, seen, options)
    if not active.sampled:
        return logits.argmax(dim=-1)
    probs = filtered_probs(logits, options, active)
    kept = probs > 0
    cdf = probs.cumsum(dim=-1)
    reached = (cdf > u[:, None] * cdf[:, -1:]) & kept
    last_kept = probs.shape[-1] - 1 - kept.flip(-1).int().argmax(dim=-1)
    token = torch.where(reached.any(dim=-1), reached.int().argmax(dim=-1), last_kept)
    return torch.where(options.greedy, logits.argmax(dim=-1), token)


def apply_repetition_penalty(logits: Tensor, seen: Tensor, options: RowOptions) -> Tensor:
    penalty = as_column(options.repetition_penalty, logits)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def filtered_probs(logits: Tensor, options: RowOptions, active: ActiveRules) -> Tensor:
    """Probabilities [B, V] after the temperature, with 0 for the tokens that a filter drops."""
    scaled = (logits - logits.amax(dim=-1, keepdim=True)) / as_column(options.temperature, logits)
    if active.top_k:
        largest = logits.topk(int(options.top_k.max()), dim=-1).values
        smallest_kept = largest.gather(-1, options.top_k[:, None].long() - 1)
        scaled = scaled.masked_fill(logits < smallest_kept, -torch.inf)
    probs = scaled.softmax(dim=-1)  # [B, V]
    most_probable = probs.amax(dim=-1, keepdim=True)
    if active.top_p:
        ordered = probs.sort(dim=-1, descending=True).values
        mass_before = ordered.cumsum(dim=-1) - ordered
        count = (mass_before < as_column(options.top_p, logits)).sum(dim=-1, keepdim=True)
        probs = probs.masked_fill(probs < ordered.gather(-1, count - 1), 0.0)
    if active.min_p:
        probs = probs.masked_fill(probs < as_column(options.min_p, logits) * most_probable, 0.0)
    return probs


def as_column(values: Tensor, logits: Tensor) -> Tensor:
    """[B] -> [B, 1], in the dtype of the logits."""
    return values.to(logits.dtype)[:, None]
