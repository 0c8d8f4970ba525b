"""The loss of rows that hold several examples (parity/tuning/packing.py); gpt_torch/packing.py is its twin."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from gpt_jax.arrays import dropout, split_key
from gpt_jax.loss import CPU_TILING, Tiling, head_loss, head_matrix
from gpt_jax.model import GPTModel
from parity.errors import check_choice
from parity.taps import tap
from parity.training.objective import Objective


def packed_loss(
    model: GPTModel,
    inputs: Array,
    targets: Array,
    segments: Array,
    key: Array | None = None,
    tiling: Tiling = CPU_TILING,
    mesh: Mesh | None = None,
) -> Array:
    """Return the cross-entropy in nats, summed over the targets that are not ignored.

    It equals that of summed_loss() for the same examples, each in a row of its own.

    Args:
        model: The model.
        inputs: Token ids, integers [B, T].
        targets: The ids to predict, integers [B, T]; see summed_loss.
        segments: The number of each position's example, integers [B, T]; the positions of an example are consecutive.
        key: Turns dropout on.
        tiling: See head_loss.
        mesh: See head_loss.

    Returns:
        A scalar of dtype float32 or float64.

    Raises:
        InputError: If the model's attention is a fused kernel, which knows no segments.
    """
    x = packed_hidden(model, inputs, segments, key)
    return head_loss(x, head_matrix(model), targets, tiling, mesh, model.config.tied_head)


def packed_hidden(model: GPTModel, tokens: Array, segments: Array, key: Array | None = None) -> Array:
    """Return the input of the output head, [B, T, D]; see packed_loss.

    A position attends to those before it in its segment, and counts from the beginning of the segment.
    """
    check_choice("attention, for packed rows,", model.attention, ["explicit"])
    embed_key, layers_key = split_key(key, 2)
    slots = jnp.arange(tokens.shape[1])  # [T]
    begins = segments != jnp.concatenate([segments[:, :1] - 1, segments[:, :-1]], axis=1)  # [B, T]
    positions = slots - jax.lax.cummax(jnp.where(begins, slots, 0), axis=1)  # [B, T]
    same = segments[:, :, None] == segments[:, None, :]  # [B, T, S]
    mask = (same & (slots[None, :] <= slots[:, None]))[:, None]  # [B, 1, T, S]
    x = model.tok_emb(tokens) + model.pos_emb(positions)  # [B, T, D]
    x = tap("embed", dropout(x, model.config.drop_rate, embed_key))  # [B, T, D]
    x = model._layers(x, mask, layers_key)  # [B, T, D]
    return tap("ln_f", model.final_norm(x))  # [B, T, D]


PACKED = Objective(packed_loss)
