"""A model's weights laid out for decoding, where a product has one row a prompt and reads every weight.

The layers lie apart, so that the loop slices no stack. On a CPU each matrix is also stored by output,
in as many groups as there are cores, and comes first in its product: XLA then reads it on all cores at
nearly the speed of memory, for one row or for eight. docs/results/performance.md has the measurements.
"""

import functools
import math
import os
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gpt_jax.model import GPTModel


class RowMajorLinear(nnx.Module):
    """nnx.LinearGeneral over the last axes of x, with its weights as [groups, out / groups, in]."""

    def __init__(self, linear: nnx.LinearGeneral, groups: int):
        kernel = linear.kernel[...]
        self.n_in_axes = len(linear.axis)
        self.out_shape = kernel.shape[self.n_in_axes :]
        matrix = kernel.reshape(math.prod(kernel.shape[: self.n_in_axes]), -1).T
        groups = groups if matrix.shape[0] % groups == 0 else 1
        self.weight = nnx.Param(matrix.reshape(groups, -1, matrix.shape[1]))
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    def __call__(self, x: Array) -> Array:
        lead = x.shape[: -self.n_in_axes]
        y = by_output(self.weight[...], x.reshape(math.prod(lead), -1)).reshape(*lead, *self.out_shape)
        return y if self.bias is None else y + self.bias[...]


class RowMajorEmbedding(nnx.Module):
    """nnx.Embed, whose table [V, D] is by output already, with such a product in `attend`."""

    def __init__(self, embedding: nnx.Embed):
        self.embedding = nnx.Param(embedding.embedding[...])

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids]

    def attend(self, x: Array) -> Array:
        return by_output(self.embedding[...][None], x)


def by_output(weight: Array, x: Array) -> Array:
    """weight [G, O, I], x [R, I] -> [R, GO]"""
    if len(x) == len(weight) == 1:  # a little faster as a product with a vector
        return jax.lax.optimization_barrier(weight[0] @ x[0])[None]
    each = jnp.broadcast_to(x, (weight.shape[0], *x.shape))
    y = jax.lax.dot_general(weight, each, (((2,), (2,)), ((0,), (0,))))  # [G, O, R]
    # Without the barrier XLA may fuse a bias into the product, as a loop that is ten times slower.
    return jax.lax.optimization_barrier(y).reshape(-1, x.shape[0]).T


def for_decoding(model: GPTModel) -> GPTModel:
    """A copy of the model for generation only; to generate many times, make it once.

    Shares the embeddings and copies the other weights. generate() makes one itself where it is given
    an ordinary model; this takes about as long as three tokens of generation.
    """
    if isinstance(model.trf_blocks, nnx.List):
        return model
    [device] = model.tok_emb.embedding[...].devices()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return _lay_out(model, cores if device.platform == "cpu" else None)


@functools.partial(jax.jit, static_argnames="groups")
def _lay_out(model: Any, groups: int | None) -> GPTModel:
    blocks = [jax.tree.map(lambda a, i=i: a[i], model.trf_blocks) for i in range(model.config.n_layer)]
    if groups is not None:
        for block in blocks:
            for branch, names in ((block.att, ("qkv_proj", "out_proj")), (block.ff, ("in_proj", "out_proj"))):
                for name in names:
                    setattr(branch, name, RowMajorLinear(getattr(branch, name), groups))
        model.tok_emb = RowMajorEmbedding(model.tok_emb)
        if not model.config.tied_head:
            model.out_head = RowMajorLinear(model.out_head, groups)
    model.trf_blocks = nnx.List(blocks)
    return model
