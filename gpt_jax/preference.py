"""Direct preference optimization (Rafailov et al. 2023); gpt_torch/preference.py has the same functions.

A row of a batch is a pair of texts, the chosen one and then the rejected one, both padded to T positions. The loss of a
pair is -log sigmoid(beta * margin), where the margin is how much further the log-probability of the chosen response has
risen above that of the reference than the log-probability of the rejected response has.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from gpt_jax.arrays import at_least_float32, shifted_logsumexp, widened
from gpt_jax.loss import CPU_TILING, Tiling, head_matrix, n_chunks
from gpt_jax.model import GPTModel
from parity.config import is_counted
from parity.training.objective import Objective, Reduction, is_pair


def pair_logprobs(
    model: GPTModel,
    inputs: Array,
    targets: Array,
    reduction: Reduction = "sum",
    key: Array | None = None,
    tiling: Tiling = CPU_TILING,
) -> Array:
    """Return the log-probability in nats that the model gives to the targets of each text.

    Args:
        model: The model.
        inputs: Token ids, integers [B, 2T]: the chosen text, then the rejected one.
        targets: The ids to predict, integers [B, 2T]. Targets -1 and -100 are ignored; any other target outside the
            vocabulary makes the result NaN, because a compiled function cannot raise.
        reduction: "sum" over the targets of a text, as in the paper, or their "mean".
        key: Turns dropout on.
        tiling: How many logits exist at a time; the backward pass computes them again.

    Returns:
        [B, 2], chosen and rejected, of dtype float32 or float64; 0 for a text without targets.
    """
    ids, targets = (tokens.reshape(2 * tokens.shape[0], -1) for tokens in (inputs, targets))  # [2B, T]
    x, head = model.hidden(ids, key), head_matrix(model)  # [2B, T, D], [V, D]
    counted = is_counted(targets)
    valid = counted & (targets >= 0) & (targets < head.shape[0])
    sums = _summed_logprobs(x, head, targets, valid, tiling)  # [2B]
    if reduction == "mean":
        sums = sums / jnp.maximum(counted.sum(axis=1), 1).astype(sums.dtype)
    return (sums * jnp.where((counted & ~valid).any(), jnp.nan, 1.0).astype(sums.dtype)).reshape(-1, 2)


def _summed_logprobs(x: Array, head: Array, targets: Array, valid: Array, tiling: Tiling) -> Array:
    """x [R, T, D], head [V, D], targets and valid [R, T] -> sums over T [R], one chunk of positions after another"""

    def chunk_sums(x: Array, targets: Array, valid: Array) -> Array:
        logits = at_least_float32(jnp.einsum("RTD,VD->RTV", x, head))
        ids = jnp.where(valid, targets, 0)[..., None]
        largest, log_total = shifted_logsumexp(logits)  # [R, T, 1]
        logprobs = jnp.take_along_axis(logits, ids, axis=-1) - largest - log_total  # [R, T, 1]
        return jnp.where(valid, logprobs[..., 0], 0).sum(axis=1)

    R, T = targets.shape
    chunks = n_chunks(R * head.shape[0], T, tiling.largest_chunk)
    if chunks == 1:
        return chunk_sums(x, targets, valid)
    parts = tuple(jnp.moveaxis(a.reshape(R, chunks, T // chunks, *a.shape[2:]), 1, 0) for a in (x, targets, valid))
    add_chunk = jax.checkpoint(lambda total, chunk: (total + chunk_sums(*chunk), None), prevent_cse=False)
    return jax.lax.scan(add_chunk, jnp.zeros(R, widened(x.dtype)), parts)[0]


def preference_losses(logprobs: Array, reference: Array, beta: float) -> Array:
    """Return the loss of each pair in nats.

    Args:
        logprobs: The model's log-probabilities [B, 2] of the chosen and the rejected texts.
        reference: Those of the reference, [B, 2].
        beta: How strongly the loss holds the model to the reference.

    Returns:
        [B]; ln 2 where both are the same.
    """
    margins = (logprobs[:, 0] - logprobs[:, 1]) - (reference[:, 0] - reference[:, 1])
    return -jax.nn.log_sigmoid(beta * margins)


def preference(beta: float, reduction: Reduction = "sum") -> Objective:
    """Return the objective, whose batches are (inputs [B, 2T], targets [B, 2T], reference [B, 2]); see above.

    Args:
        beta: See preference_losses().
        reduction: See pair_logprobs(); the reference's log-probabilities have the same.
    """

    def rows(
        model: GPTModel,
        inputs: Array,
        targets: Array,
        reference: Array,
        key: Array | None = None,
        tiling: Tiling = CPU_TILING,
        **_: Any,
    ) -> Array:
        return pair_logprobs(model, inputs, targets, reduction, key, tiling)

    def summed_loss(model: GPTModel, inputs: Array, targets: Array, reference: Array, **options: Any) -> Array:
        losses = preference_losses(rows(model, inputs, targets, reference, **options), reference, beta)
        return jnp.where(is_pair(targets), losses, 0).sum()

    return Objective(summed_loss, lambda targets: is_pair(targets).sum(), rows=rows)
