"""GPT-2 in Flax NNX. gpt_torch/model.py is the same model in PyTorch, line by line where possible.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and OpenAI's code (openai/gpt-2,
src/model.py). Axis letters: parity/config.py. The model computes in the dtype of its parameters, except that LayerNorm,
softmax and logits are computed in float32 at least. Modules are pytrees, for jax.jit, jax.grad and optax as they are.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gpt_jax.arrays import add_axes, at_least_float32, check_ids, dropout, merge_heads, split_key, widened
from gpt_jax.weights import config_of, floating_dtype, load_weights
from parity import taps
from parity.config import LAYER_NORM_EPS, GPTConfig, as_config
from parity.errors import InputError, check_choice
from parity.taps import tap
from parity.weights import initial_weights

LayerCache = tuple[Array, Array]  # keys and values of one layer, both [BN, S, H]; see MultiHeadAttention._cached
ATTENTIONS = ("explicit", "cudnn")
REMAT_POLICIES = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


# Flax would initialize each weight here from random keys. The initial weights of this project are a
# function of one seed, equal in both backends (parity.weights.initial_weights), so parameters start as zeros.
def Linear(*args: Any, **options: Any) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(*args, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0), **options)


class Embedding(nnx.Module):
    """A table of vectors [V, D], in which an id outside 0..V-1 reads NaN; in nnx.Embed, -1 reads the last vector."""

    def __init__(self, n_rows: int, n_embd: int):
        self.embedding = nnx.Param(jnp.zeros((n_rows, n_embd), jnp.float32))

    def __call__(self, ids: Array) -> Array:
        return self.embedding[...].at[ids].get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)

    def attend(self, x: Array) -> Array:
        return jnp.dot(x, self.embedding[...].T)


class MultiHeadAttention(nnx.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2.2; OpenAI's `attn`).

    x [B, T, D] -> [B, T, D]. `mask`: bool, broadcastable to [B, N, T, S], true where a query may attend.
    `attention`: "explicit", the formula as written here, or "cudnn", the fused kernel (GPU, 16-bit dtypes).
    """

    def __init__(self, config: GPTConfig, attention: str):
        self.n_head = config.n_head
        self.drop_rate = config.drop_rate
        self.attention = attention
        self.qkv_proj = Linear(config.n_embd, (3, config.n_head, config.head_width), use_bias=config.qkv_bias)
        self.out_proj = Linear((config.n_head, config.head_width), config.n_embd, axis=(-2, -1))

    def __call__(
        self, x: Array, mask: Array, cache: LayerCache | None = None, slot: Any = 0, key: Array | None = None
    ) -> tuple[Array, LayerCache | None]:
        qkv = self.qkv_proj(x)  # [B, T, C, N, H]
        q, k, v = (qkv[:, :, i] for i in range(3))  # each [B, T, N, H]
        q = tap("attn.q", q)
        k = tap("attn.k", k)
        v = tap("attn.v", v)
        if cache is not None:
            z, cache = self._cached(q, k, v, mask, cache, slot)  # [B, T, N, H]
        elif taps.attention(self.attention) == "explicit":
            z = self._explicit(q, k, v, mask, key)  # [B, T, N, H]
        else:
            z = self._cudnn(q, k, v, key)  # [B, T, N, H]
        z = tap("attn.z", z)
        return tap("attn.out", self.out_proj(z)), cache  # [B, T, D]

    def _explicit(self, q: Array, k: Array, v: Array, mask: Array, key: Array | None) -> Array:
        scores = jnp.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1])
        scores = tap("attn.scores", at_least_float32(scores))
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        pattern = tap("attn.pattern", jax.nn.softmax(scores, axis=-1).astype(v.dtype))
        # As "->BTNH", XLA for CPUs makes the pattern the second factor and computes its softmax again for each tile.
        return jnp.einsum("BNTS,BSNH->BNTH", dropout(pattern, self.drop_rate, key), v).swapaxes(1, 2)

    def _cudnn(self, q: Array, k: Array, v: Array, key: Array | None) -> Array:
        if self.drop_rate and key is not None:
            raise InputError('attention "cudnn" has no dropout; use "explicit", or give no key')
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def _cached(
        self, q: Array, k: Array, v: Array, mask: Array, cache: LayerCache, slot: Any
    ) -> tuple[Array, LayerCache]:
        """Write k and v into the cache at `slot`, and attend as in _explicit; return z [B, T, N, H] and the new cache.

        Batch and heads are one axis, G = BN: with two axes XLA copies the whole cache for each token.
        """
        sum_dtype = widened(q.dtype)
        q, k, v = (merge_heads(x) for x in (q, k, v))  # [G, T, H]
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, axis=1)
            for buffer, new in zip(cache, (k, v), strict=True)
        )  # [G, S, H]
        scores = jnp.einsum("GTH,GSH->GTS", q, keys, preferred_element_type=sum_dtype) / math.sqrt(q.shape[-1])
        scores = scores.reshape(-1, self.n_head, *scores.shape[1:])  # [B, N, T, S]
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        pattern = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
        pattern = pattern.reshape(-1, *pattern.shape[2:])  # [G, T, S]
        z = jnp.einsum("GTS,GSH->GTH", pattern, values, preferred_element_type=sum_dtype).astype(v.dtype)
        return z.reshape(-1, self.n_head, *z.shape[1:]).swapaxes(1, 2), (keys, values)


class LayerNorm(nnx.Module):
    """LayerNorm with the biased variance (Ba et al. 2016; OpenAI's `norm`). x [..., D] -> [..., D]."""

    def __init__(self, n_embd: int):
        self.eps = LAYER_NORM_EPS
        self.scale = nnx.Param(jnp.ones(n_embd))
        self.shift = nnx.Param(jnp.zeros(n_embd))

    @jax.checkpoint  # recomputing this in the backward pass is faster than storing and reading its intermediates
    def __call__(self, x: Array) -> Array:
        x32 = at_least_float32(x)
        mean = x32.mean(axis=-1, keepdims=True)
        var = jnp.square(x32 - mean).mean(axis=-1, keepdims=True)
        normed = (x32 - mean) * jax.lax.rsqrt(var + self.eps)
        scale, shift = (add_axes(p[...], x32) for p in (self.scale, self.shift))  # each [..., D]
        return (normed * scale + shift).astype(x.dtype)


class GELU(nnx.Module):
    """GELU in its tanh form (Hendrycks & Gimpel 2016; OpenAI's `gelu`). torch's default, erf, differs by up to 5e-4."""

    @jax.checkpoint  # for the same reason as in LayerNorm
    def __call__(self, x: Array) -> Array:
        # Multiplied in this order, XLA recognizes GELU on a GPU and computes it at the end of the product before it.
        return x * (0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))))


class FeedForward(nnx.Module):
    """OpenAI's `mlp`: x [B, T, D] -> [B, T, F] -> [B, T, D]."""

    def __init__(self, config: GPTConfig):
        self.in_proj = Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = GELU()
        self.out_proj = Linear(4 * config.n_embd, config.n_embd)

    def __call__(self, x: Array) -> Array:
        h = tap("mlp.pre", self.in_proj(x))  # [B, T, F]
        h = tap("mlp.post", self.gelu(h))  # [B, T, F]
        return tap("mlp.out", self.out_proj(h))  # [B, T, D]


class TransformerBlock(nnx.Module):
    """OpenAI's `block`: x + att(norm1(x)), then x + ff(norm2(x)). x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: GPTConfig, attention: str):
        self.drop_rate = config.drop_rate
        self.norm1 = LayerNorm(config.n_embd)
        self.att = MultiHeadAttention(config, attention)
        self.norm2 = LayerNorm(config.n_embd)
        self.ff = FeedForward(config)

    def __call__(
        self, x: Array, mask: Array, cache: LayerCache | None = None, slot: Any = 0, key: Array | None = None
    ) -> tuple[Array, LayerCache | None]:
        att_key, drop_key1, drop_key2 = split_key(key, 3)
        h = tap("ln_1", self.norm1(x))  # [B, T, D]
        h, cache = self.att(h, mask, cache, slot, att_key)  # [B, T, D]
        x = tap("resid_mid", x + dropout(h, self.drop_rate, drop_key1))  # [B, T, D]
        h = tap("ln_2", self.norm2(x))  # [B, T, D]
        h = self.ff(h)  # [B, T, D]
        return tap("resid_post", x + dropout(h, self.drop_rate, drop_key2)), cache  # [B, T, D]


class GPTModel(nnx.Module):
    """GPT-2: tokens [B, T] -> logits [B, T, V] (Radford et al. 2019; `model` in openai/gpt-2 src/model.py).

    The weights of all layers are stacked, [L, ...], and the forward pass scans over them. Dropout is applied only
    in calls that are given a key. To generate text, use gpt_jax.generate.

    Args:
        config: A GPTConfig, the name of a preset, or a dict with the notebook's keys.
        seed: Seed of the initial weights, which equal those of gpt_torch.GPTModel with the same seed. None leaves
            zeros, for a model whose weights are loaded next.
        attention: "explicit" or "cudnn"; see MultiHeadAttention.
        unroll: Number of layers per iteration of the compiled scan.
        remat: Which activations the backward pass recomputes instead of storing: "none", "products" (all but the
            results of matrix products with weights), or "all".

    Raises:
        InputError: For an unknown preset, attention or remat, and for a configuration or unroll that is not valid.
    """

    def __init__(
        self,
        config: GPTConfig | Mapping[str, Any] | str,
        seed: int | None = 0,
        attention: str = "explicit",
        unroll: int = 1,
        remat: str = "none",
    ):
        check_choice("attention", attention, ATTENTIONS)
        check_choice("remat", remat, ("none", *REMAT_POLICIES))
        if not isinstance(unroll, int) or unroll < 1:
            raise InputError(f"unroll must be a positive integer, got {unroll!r:.60}")
        self.config = config = as_config(config)
        self.attention = attention
        self.unroll = unroll
        self.remat = remat
        self.tok_emb = Embedding(config.n_vocab, config.n_embd)
        self.pos_emb = Embedding(config.n_ctx, config.n_embd)
        self.trf_blocks = jax.vmap(lambda _: TransformerBlock(config, attention), axis_size=config.n_layer)(None)
        self.final_norm = LayerNorm(config.n_embd)
        if not config.tied_head:
            self.out_head = Linear(config.n_embd, config.n_vocab, use_bias=False)
        if seed is not None:
            load_weights(self, initial_weights(config, seed))

    def __call__(self, tokens: Array, key: Array | None = None) -> Array:
        """Return the logits of the next token at each position.

        Args:
            tokens: Integer ids [B, T].
            key: A jax.random key, a scalar of a key dtype, which turns dropout on.

        Returns:
            Logits [B, T, V], float32 (float64 if the parameters are).

        Raises:
            InputError: If T exceeds n_ctx or an id is outside the vocabulary. Under jit the ids are unknown, so
                one outside it gives NaN; generate() and the trainers check ids before they compile.
        """
        return head_logits(self, self.hidden(tokens, key))

    def hidden(self, tokens: Array, key: Array | None = None) -> Array:
        """Return the input of the output head: the normalized residual stream [B, T, D], in the parameters' dtype.

        Args:
            tokens: Integer ids [B, T].
            key: A jax.random key, a scalar of a key dtype, which turns dropout on.

        Raises:
            InputError: If T exceeds n_ctx or, outside of jit, an id is outside the vocabulary.
        """
        self.config.check_tokens(tokens.shape)
        check_ids(tokens, self.config)
        embed_key, layers_key = split_key(key, 2)
        slots = jnp.arange(tokens.shape[1])  # [T]
        mask = (slots[None, :] <= slots[:, None])[None, None]  # [1, 1, T, S]
        x = self.tok_emb(tokens) + self.pos_emb(slots[None])  # [B, T, D]
        x = tap("embed", dropout(x, self.config.drop_rate, embed_key))  # [B, T, D]
        x = self._layers(x, mask, layers_key)  # [B, T, D]
        return tap("ln_f", self.final_norm(x))  # [B, T, D]

    def _layers(self, x: Array, mask: Array, key: Array | None) -> Array:
        def layer(x, block_and_key):
            block, layer_key = block_and_key
            x, _ = block(x, mask, key=layer_key)
            return x, None

        stacked = self.trf_blocks, None if key is None else jax.random.split(key, self.config.n_layer)
        if taps.probing():  # a probe needs each layer's number, and values that neither scan nor jax.checkpoint traces
            for number in range(self.config.n_layer):
                taps.layer(number)
                x, _ = layer(x, jax.tree.map(lambda a, number=number: a[number], stacked))
            taps.layer(None)
            return x
        if self.remat != "none":
            layer = jax.checkpoint(layer, policy=REMAT_POLICIES[self.remat])
        return jax.lax.scan(layer, x, stacked, unroll=self.unroll)[0]


def head_logits(model: Any, x: Array) -> Array:
    """Apply the output head: x [..., D] -> logits [..., V], in float32 at least."""
    logits = model.tok_emb.attend(x) if model.config.tied_head else model.out_head(x)  # [..., V]
    return tap("logits", at_least_float32(logits))


def cast(model: GPTModel, dtype: Any) -> GPTModel:
    """Return a copy of a model in another dtype, in which the copy computes.

    Args:
        model: The model; it is not changed.
        dtype: A JAX or NumPy dtype or its name, such as "bfloat16".

    Returns:
        A copy of the model with converted parameters.

    Raises:
        InputError: If the dtype is not a floating-point dtype, and for float64 without jax_enable_x64.
    """
    config_of(model)  # raises for another class
    dtype = floating_dtype(dtype)
    return jax.tree.map(lambda a: a.astype(dtype), model)
