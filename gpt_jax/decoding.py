"""A GPT-2 whose weights are arranged for decoding, where each matrix product has one row per prompt.

The memory bandwidth limits the speed of such products, because every weight is read. The layers are unstacked, so that
the decoding loop never slices a stacked array, and each matrix is stored transposed, [out, in], so that an output is
the sum of a contiguous row, which XLA on a GPU computes in place and on all multiprocessors. On a CPU each matrix is
also split into as many groups of outputs as there are cores, and is the left operand of its product: XLA then reads it
on all cores at nearly the full memory bandwidth, for one row as well as for eight. docs/results/performance.md has the
measurements.
"""

import functools
import math
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gpt_jax.arrays import widened
from gpt_jax.lora import lora_config, merge
from gpt_jax.model import Embedding, GPTModel, LayerCache, head_logits
from gpt_jax.weights import config_of
from parity.errors import InputError
from parity.parts import usable_cores

Cache = list[LayerCache]
"""One entry per layer."""


class DecodingModel(nnx.Module):
    """A copy of a GPTModel for generation with a key/value cache; made by for_decoding().

    It shares the embedding tables of the GPTModel and copies the other weights. It offers decode() and new_cache()
    only: logits of whole sequences, gradients, activations and files need the GPTModel.

    Args:
        model: The model, without adapters.
        groups: Number of groups of outputs into which each matrix is split.
    """

    def __init__(self, model: GPTModel, groups: int):
        model = jax.tree.map(lambda a: a, model)  # copies the modules, not the arrays: the caller's must not change
        self.config = config = model.config
        self.attention = "explicit"
        self.tok_emb = RowMajorEmbedding(model.tok_emb)
        self.pos_emb = model.pos_emb
        blocks = [jax.tree.map(lambda a, i=i: a[i], model.trf_blocks) for i in range(config.n_layer)]
        for block in blocks:
            for branch, name in (
                (block.att, "qkv_proj"),
                (block.att, "out_proj"),
                (block.ff, "in_proj"),
                (block.ff, "out_proj"),
            ):
                setattr(branch, name, RowMajorLinear(getattr(branch, name), groups))
        self.blocks = nnx.List(blocks)
        self.final_norm = model.final_norm
        if not config.tied_head:
            self.out_head = RowMajorLinear(model.out_head, groups)

    def decode(self, tokens: Array, cache: Cache, slot: Any, pad_lengths: Array) -> tuple[Array, Cache]:
        """Return the logits of the token after `tokens`, and write the keys and values of `tokens` into the cache.

        Args:
            tokens: Integer ids [B, T], for the cache slots slot..slot+T-1.
            cache: The result of new_cache() or of the previous call: keys and values of each layer [B * N, S, H],
                in the dtype of the parameters.
            slot: The first slot to write.
            pad_lengths: int [B]. The first pad_lengths[b] slots of row b are padding: they are not attended to,
                and positions count from the slot after them.

        Returns:
            (logits [B, V] with dtype float32 at least, the new cache).
        """
        slots = jnp.arange(cache[0][0].shape[1], dtype=jnp.int32)[None, None]  # [1, 1, S]
        queries = slot + jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]  # [1, T]
        mask = (slots <= queries[..., None]) & (slots >= pad_lengths[:, None, None])  # [B, T, S]
        positions = jnp.clip(queries - pad_lengths[:, None], 0, self.config.n_ctx - 1)  # [B, T]
        x = self.tok_emb(tokens) + self.pos_emb(positions)  # [B, T, D]
        updated = []
        for block, layer_cache in zip(self.blocks, cache, strict=True):
            x, layer_cache = block(x, mask[:, None], layer_cache, slot)  # [B, T, D]
            updated.append(layer_cache)
        x = self.final_norm(x[:, -1])  # [B, D]
        return head_logits(self, x), updated

    def new_cache(self, batch_size: int, length: int) -> Cache:
        """Return an empty key/value cache for decode().

        Args:
            batch_size: Number of rows, B.
            length: Number of tokens that it has room for, S.

        Returns:
            For each layer a pair of zero-filled keys and values, both [B * N, S, H] in the dtype of the parameters.
        """
        dtype = self.tok_emb.embedding[...].dtype
        shape = (batch_size * self.config.n_head, length, self.config.head_width)  # [BN, S, H]
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.config.n_layer)]

    def hidden(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a call, because the model can only decode.

        Args:
            args: Arguments of GPTModel's method.
            kwargs: The same by name.

        Raises:
            InputError: Always.
        """
        raise InputError("a model from for_decoding() can only generate; use the GPTModel that it was made from")

    __call__ = hidden


class RowMajorLinear(nnx.Module):
    """nnx.LinearGeneral over the last axes of x, with the weights stored as [groups, out / groups, in]."""

    def __init__(self, linear: nnx.LinearGeneral, groups: int):
        kernel = linear.kernel[...]
        self.n_in_axes = len(linear.axis)
        self.out_shape = kernel.shape[self.n_in_axes :]
        matrix = kernel.reshape(math.prod(kernel.shape[: self.n_in_axes]), -1).T
        groups = groups if matrix.shape[0] % groups == 0 else 1
        self.weight = nnx.Param(matrix.reshape(groups, -1, matrix.shape[1]))
        self.bias = None if linear.bias is None else nnx.Param(linear.bias[...])

    def __call__(self, x: Array) -> Array:
        batch_shape = x.shape[: -self.n_in_axes]
        y = row_major_product(self.weight[...], x.reshape(math.prod(batch_shape), -1))
        y = y.reshape(*batch_shape, *self.out_shape)
        if self.bias is not None:
            y = y + self.bias[...][(None,) * len(batch_shape)].astype(y.dtype)
        return y.astype(x.dtype)


class RowMajorEmbedding(nnx.Module):
    """An Embedding, whose table [V, D] is row-major already; `attend` uses row_major_product."""

    def __init__(self, embedding: Embedding):
        self.embedding = nnx.Param(embedding.embedding[...])

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...][ids]

    def attend(self, x: Array) -> Array:
        return row_major_product(self.embedding[...][None], x)


MANY_ROWS = 128
"""With this many rows or more, as in prompts, a CPU reads the whole matrix as the second operand. The arithmetic then
takes longer than reading the weights, and the result has the order in which the next operation reads it. With groups
GELU would be computed once for each, and XLA (jax 0.10.2) computes wrong values if it fuses LayerNorm with copies of
4,096 rows or more."""


def row_major_product(weight: Array, x: Array) -> Array:
    """x @ W of a matrix W [in, out] stored as [groups, out / groups, in]; x [rows, in] -> [rows, out].

    The sums and the result are float32 at least: XLA on a GPU would round even the addends of a bfloat16 product.
    """
    return jax.lax.platform_dependent(weight, x, cpu=_weight_first, default=_x_first)


def _weight_first(weight: Array, x: Array) -> Array:
    sum_dtype = widened(x.dtype)
    if len(x) == len(weight) == 1:  # a matrix-vector product is slightly faster
        return jax.lax.optimization_barrier(jnp.matmul(weight[0], x[0], preferred_element_type=sum_dtype))[None]
    if len(x) >= MANY_ROWS:
        matrix = weight.reshape(-1, weight.shape[2])
        return jax.lax.optimization_barrier(jnp.einsum("RI,OI->RO", x, matrix, preferred_element_type=sum_dtype))
    copies = jnp.broadcast_to(x, (weight.shape[0], *x.shape))
    y = jnp.einsum("GOI,GRI->GOR", weight, copies, preferred_element_type=sum_dtype)
    # Without the barrier XLA may fuse a bias into the product, which becomes a loop that is ten times slower.
    return jax.lax.optimization_barrier(y).reshape(-1, x.shape[0]).T


def _x_first(weight: Array, x: Array) -> Array:
    y = jnp.einsum("RI,GOI->RGO", x, weight, preferred_element_type=widened(x.dtype))
    return y.reshape(len(x), -1)


def for_decoding(model: GPTModel | DecodingModel) -> DecodingModel:
    """Convert a model for generation. Do this once if you call generate() often.

    generate() and stream() convert a GPTModel in each call, which takes about as long as generating three tokens.

    Args:
        model: A GPTModel, which is not changed; adapters are merged. A DecodingModel is returned as it is.

    Returns:
        The model with its weights arranged for decoding, in the same dtype and on the same device; on one
        device if the model is replicated over several.

    Raises:
        InputError: For another class, for a model without values (traced or abstract), and for adapters in 16 bits.
    """
    if isinstance(model, DecodingModel):
        return model
    config_of(model)  # raises for another class
    if lora_config(model) is not None:
        if jnp.finfo(model.tok_emb.embedding[...].dtype).bits < 32:
            raise InputError("adapters are merged for generation, which needs float32: merge() before cast()")
        model = merge(model)
    parameters = jax.tree.leaves(model)
    if any(isinstance(leaf, jax.core.Tracer | jax.ShapeDtypeStruct) for leaf in parameters):
        raise InputError(
            "generation needs a model with values; this one is traced (by jax.jit, jax.vmap, ...) or abstract"
        )
    if all(leaf.is_fully_replicated for leaf in parameters):
        # One copy is enough; a program of several CPU devices could deadlock.
        model = jax.tree.map(lambda leaf: leaf.addressable_data(0), model)
    device = next(iter(model.tok_emb.embedding[...].devices()))
    return _convert(model, usable_cores() if device.platform == "cpu" else 1)


@functools.partial(jax.jit, static_argnames="groups")
def _convert(model: GPTModel, groups: int) -> DecodingModel:
    return DecodingModel(model, groups)
