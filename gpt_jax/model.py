"""GPT-2 in Flax NNX: gpt_torch/model.py, said in JAX, for compiled speed.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and OpenAI's
code (openai/gpt-2, src/model.py). Axis letters: parity/config.py. The model computes in the dtype
of its parameters; LayerNorm, softmax and logits are at least float32. Modules are plain pytrees:
use jax.jit, jax.grad and optax on them directly.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from gpt_jax.weights import load_weights
from parity import taps
from parity.config import LAYER_NORM_EPS, GPTConfig, as_config
from parity.taps import tap
from parity.weights import initial_weights

# For each layer keys and values, both [BN, S, H]. Rows and heads are one axis, or XLA would copy the
# whole cache for each token, to merge them for its products.
Cache = list[tuple[Array, Array]]


# What to keep for the gradient where the rest is computed again.
REMAT = {
    "products": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "all": jax.checkpoint_policies.nothing_saveable,
}


# Weights come from parity.weights.initial_weights or from a file; until then they are zeros.
def Linear(*args: Any, **options: Any) -> nnx.LinearGeneral:
    return nnx.LinearGeneral(*args, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0), **options)


def Embedding(rows: int, n_embd: int) -> nnx.Embed:
    embedding = nnx.Embed(rows, n_embd, embedding_init=nnx.initializers.zeros, rngs=nnx.Rngs(0))
    embedding.dtype = None  # nnx.Embed would stay with float32 whatever its parameter is cast to
    return embedding


class MultiHeadAttention(nnx.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2.2; OpenAI's `attn`).

    x [B, T, D] -> [B, T, D]. `mask`: bool, broadcastable to [B, N, T, S], true where a query may look.
    `attention`: "explicit", the formula as written here, or "cudnn", the fused kernel (GPU, 16 bit).
    """

    def __init__(self, config: GPTConfig, attention: str):
        self.attention = attention
        self.n_head = config.n_head
        self.drop_rate = config.drop_rate
        self.qkv_proj = Linear(config.n_embd, (3, config.n_head, config.head_width), use_bias=config.qkv_bias)
        self.out_proj = Linear((config.n_head, config.head_width), config.n_embd, axis=(-2, -1))

    def __call__(self, x: Array, mask: Array, cache=None, slot=0, key: Array | None = None):
        q, k, v = jnp.moveaxis(self.qkv_proj(x), 2, 0)  # each [B, T, N, H]
        q, k, v = tap("attn.q", q), tap("attn.k", k), tap("attn.v", v)
        if taps.attention(self.attention) == "cudnn" and cache is None:
            z = self._cudnn(q, k, v)
            return tap("attn.out", self.out_proj(tap("attn.z", z))), None  # [B, T, D]
        q, k, v = (merge_heads(a) for a in (q, k, v))  # [BN, T, H]
        if cache is not None:
            k, v = cache = tuple(
                jax.lax.dynamic_update_slice_in_dim(buffer, new, slot, axis=1)
                for buffer, new in zip(cache, (k, v), strict=True)
            )  # [BN, S, H]
        z = self._explicit(q, k, v, mask, key).reshape(-1, self.n_head, *q.shape[1:])  # [B, N, T, H]
        return tap("attn.out", self.out_proj(tap("attn.z", z.swapaxes(1, 2)))), cache  # [B, T, D]

    def _explicit(self, q: Array, k: Array, v: Array, mask: Array, key: Array | None) -> Array:
        scores = jnp.einsum("GTH,GSH->GTS", q, k) / math.sqrt(q.shape[-1])  # G: BN
        scores = at_least_float32(scores).reshape(-1, self.n_head, *scores.shape[1:])  # [B, N, T, S]
        scores = tap("attn.scores", scores)
        scores = jnp.where(mask, scores, jnp.finfo(scores.dtype).min)
        pattern = tap("attn.pattern", jax.nn.softmax(scores, axis=-1).astype(v.dtype))
        pattern = dropout(pattern, self.drop_rate, key)
        return jnp.einsum("GTS,GSH->GTH", pattern.reshape(-1, *pattern.shape[2:]), v)

    def _cudnn(self, q: Array, k: Array, v: Array) -> Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


class LayerNorm(nnx.Module):
    """Ba et al. 2016; OpenAI's `norm`, with the biased variance. x [..., D] -> [..., D]."""

    def __init__(self, n_embd: int):
        self.eps = LAYER_NORM_EPS
        self.scale = nnx.Param(jnp.ones(n_embd))
        self.shift = nnx.Param(jnp.zeros(n_embd))

    @jax.checkpoint  # a gradient computes it again from x, which is faster than to read what lies between
    def __call__(self, x: Array) -> Array:
        wide = at_least_float32(x)
        mean = wide.mean(axis=-1, keepdims=True)
        var = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
        normed = (wide - mean) * jax.lax.rsqrt(var + self.eps)
        return (normed * self.scale[...] + self.shift[...]).astype(x.dtype)


class GELU(nnx.Module):
    """The tanh form, as in OpenAI's `gelu`; torch's default is the erf form, some 5e-4 away."""

    @jax.checkpoint  # as LayerNorm
    def __call__(self, x: Array) -> Array:
        return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class FeedForward(nnx.Module):
    """OpenAI's `mlp`: x [B, T, D] -> [B, T, F] -> [B, T, D]."""

    def __init__(self, config: GPTConfig):
        self.in_proj = Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = GELU()
        self.out_proj = Linear(4 * config.n_embd, config.n_embd)

    def __call__(self, x: Array) -> Array:
        x = tap("mlp.pre", self.in_proj(x))  # [B, T, F]
        return tap("mlp.out", self.out_proj(tap("mlp.post", self.gelu(x))))  # [B, T, D]


class TransformerBlock(nnx.Module):
    """OpenAI's `block`: LayerNorm before each branch, the branch added to the residual stream."""

    def __init__(self, config: GPTConfig, attention: str):
        self.drop_rate = config.drop_rate
        self.norm1 = LayerNorm(config.n_embd)
        self.att = MultiHeadAttention(config, attention)
        self.norm2 = LayerNorm(config.n_embd)
        self.ff = FeedForward(config)

    def __call__(self, x: Array, mask: Array, cache=None, slot=0, key: Array | None = None):
        keys = (None,) * 3 if key is None else jax.random.split(key, 3)
        z, cache = self.att(tap("ln_1", self.norm1(x)), mask, cache, slot, keys[0])
        x = tap("resid_mid", x + dropout(z, self.drop_rate, keys[1]))  # [B, T, D]
        z = dropout(self.ff(tap("ln_2", self.norm2(x))), self.drop_rate, keys[2])
        return tap("resid_post", x + z), cache  # [B, T, D]


class GPTModel(nnx.Module):
    """OpenAI's `model`: tokens [B, T] -> logits [B, T, V].

    `config`: a GPTConfig, a preset's name, or the notebook's dict. `seed`: of the initial weights,
    which equal those of gpt_torch.GPTModel with the same seed; None leaves zeros. The layers' weights
    are stacked [L, ...] and scanned over; `unroll` layers are written out in the compiled program. `remat`:
    what a gradient computes again instead of keeping it, "none", all but the products ("products"), or "all".
    Dropout happens only where a call is given a key.
    """

    def __init__(
        self,
        config: GPTConfig | Mapping[str, Any] | str,
        seed: int | None = 0,
        attention: str = "explicit",
        unroll: int = 1,
        remat: str = "none",
    ):
        self.config = config = as_config(config)
        self.attention, self.remat = attention, remat
        self.unroll = unroll
        self.tok_emb = Embedding(config.n_vocab, config.n_embd)
        self.pos_emb = Embedding(config.n_ctx, config.n_embd)
        self.trf_blocks = jax.vmap(lambda _: TransformerBlock(config, attention), axis_size=config.n_layer)(None)
        self.final_norm = LayerNorm(config.n_embd)
        if not config.tied_head:
            self.out_head = Linear(config.n_embd, config.n_vocab, use_bias=False)
        if seed is not None:
            load_weights(self, initial_weights(config, seed))

    def __call__(self, tokens: Array, key: Array | None = None) -> Array:
        """tokens int [B, T] -> logits float32 [B, T, V]; `key` turns dropout on.

        Raises InputError for T beyond the context and for ids outside the vocabulary. Under jit
        ids are not known: the entry points check them before, and an id too large gives NaN.
        """
        return self._logits(self.hidden(tokens, key))

    def hidden(self, tokens: Array, key: Array | None = None) -> Array:
        """What the head reads: tokens int [B, T] -> [B, T, D]. Raises as a call does."""
        self.config.check_tokens(tokens.shape)
        check_ids(tokens, self.config)
        T = tokens.shape[1]
        slots = jnp.arange(T)
        mask = slots[None, :] <= slots[:, None]  # [T, S]
        drop_key, layers_key = (None, None) if key is None else jax.random.split(key)
        x = self.tok_emb(tokens) + self.pos_emb(slots)  # [B, T, D]
        x = tap("embed", dropout(x, self.config.drop_rate, drop_key))
        layer_keys = None if layers_key is None else jax.random.split(layers_key, self.config.n_layer)

        def layer(x, block_and_key):
            block, layer_key = block_and_key
            return block(x, mask, key=layer_key)[0], None

        if self.remat != "none" and not taps.probing():  # jax.checkpoint would trace the activations
            layer = jax.checkpoint(layer, policy=REMAT[self.remat])
        if taps.probing():  # each layer by its name
            for number in range(self.config.n_layer):
                taps.layer(number)
                x, _ = layer(x, jax.tree.map(lambda a, number=number: a[number], (self.trf_blocks, layer_keys)))
            taps.layer(None)
        else:
            x, _ = jax.lax.scan(layer, x, (self.trf_blocks, layer_keys), unroll=self.unroll)
        return tap("ln_f", self.final_norm(x))

    def decode(self, tokens: Array, cache: Cache, slot, first: Array):
        """Logits [B, V] after the last of `tokens` [B, T], which take the cache slots from `slot` on.

        Row b begins at slot first[b]: earlier slots are padding, and positions count from there.
        Returns (logits, written cache). For a model from gpt_jax.for_decoding, whose layers lie apart.
        """
        slots = jnp.arange(cache[0][0].shape[1])  # [S]
        queries = slot + jnp.arange(tokens.shape[1])  # [T]
        mask = (slots <= queries[:, None]) & (slots >= first[:, None, None])  # [B, T, S]
        positions = jnp.clip(queries - first[:, None], 0, self.config.n_ctx - 1)  # [B, T]
        x = self.tok_emb(tokens) + self.pos_emb(positions)  # [B, T, D]
        written = []
        blocks: Any = self.trf_blocks
        for block, layer_cache in zip(blocks, cache, strict=True):
            x, layer_cache = block(x, mask[:, None], layer_cache, slot)
            written.append(layer_cache)
        return self._logits(self.final_norm(x[:, -1])), written

    def new_cache(self, batch: int, length: int) -> Cache:
        """Empty keys and values of `length` slots for each layer."""
        dtype = self.tok_emb.embedding[...].dtype
        shape = (batch * self.config.n_head, length, self.config.head_width)  # [BN, S, H]
        return [(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype)) for _ in range(self.config.n_layer)]

    def _logits(self, x: Array) -> Array:
        head = self.tok_emb.attend if self.config.tied_head else self.out_head
        return tap("logits", at_least_float32(head(x)))  # [..., V]


def cast(model: GPTModel, dtype: Any) -> GPTModel:
    """The model with its parameters in `dtype`; it then computes in it."""
    return jax.tree.map(lambda a: a.astype(dtype), model)


def at_least_float32(x: Array) -> Array:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def merge_heads(x: Array) -> Array:
    """[B, T, N, H] -> [BN, T, H]"""
    return x.swapaxes(1, 2).reshape(-1, x.shape[1], x.shape[3])


def dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Srivastava et al. 2014: zero with probability `rate`, scale the rest up; nothing without a key."""
    if key is None or rate == 0.0:
        return x
    return jnp.where(jax.random.bernoulli(key, 1 - rate, x.shape), x / (1 - rate), 0).astype(x.dtype)


def check_ids(tokens: Array, config: GPTConfig) -> None:
    """Raise InputError for an id outside the vocabulary; a traced array has no ids yet."""
    if not isinstance(tokens, jax.core.Tracer):
        ids = np.asarray(tokens)
        config.check_tokens(ids.shape, int(ids.min(initial=0)), int(ids.max(initial=0)))
