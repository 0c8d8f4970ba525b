"""GPT-2 in PyTorch: the readable reference. gpt_jax/model.py is the same text in Flax.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and OpenAI's
code (openai/gpt-2, src/model.py). Axis letters: parity/config.py. The model computes in the dtype
of its parameters; LayerNorm, softmax and logits are at least float32.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_torch.weights import load_weights
from parity import taps
from parity.config import LAYER_NORM_EPS, GPTConfig, as_config
from parity.taps import tap
from parity.weights import initial_weights

Cache = list[tuple[Tensor, Tensor]]  # for each layer keys and values, both [B, S, N, H]


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2.2; OpenAI's `attn`).

    x [B, T, D] -> [B, T, D]. `mask`: bool, broadcastable to [B, N, T, S], true where a query may look.
    `attention`: "explicit", the formula as written here, or "sdpa", torch's fused kernel.
    """

    def __init__(self, config: GPTConfig, attention: str):
        super().__init__()
        self.heads = (3, config.n_head, config.head_width)
        self.attention = attention
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None = None, slot: int = 0) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(-1, self.heads).unbind(2)  # each [B, T, N, H]
        q, k, v = tap("attn.q", q), tap("attn.k", k), tap("attn.v", v)
        if cache is not None:
            for buffer, new in zip(cache, (k, v), strict=True):
                buffer[:, slot : slot + new.shape[1]] = new
            k, v = cache  # [B, S, N, H]
        explicit = taps.attention(self.attention) == "explicit"
        z = self._explicit(q, k, v, mask) if explicit else self._sdpa(q, k, v, None if cache is None else mask)
        return tap("attn.out", self.out_proj(tap("attn.z", z).flatten(2)))  # [B, T, D]

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1])
        scores = tap("attn.scores", at_least_float32(scores))  # [B, N, T, S]
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        pattern = self.dropout(tap("attn.pattern", scores.softmax(dim=-1).to(v.dtype)))
        return torch.einsum("BNTS,BSNH->BTNH", pattern, v)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # [B, N, T, H]
        drop_rate = self.dropout.p if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=mask is None)
        return z.transpose(1, 2)


class LayerNorm(nn.Module):
    """Ba et al. 2016; OpenAI's `norm`, with the biased variance. x [..., D] -> [..., D]."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.eps = LAYER_NORM_EPS
        self.scale = nn.Parameter(torch.ones(n_embd))
        self.shift = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        wide = at_least_float32(x)
        mean = wide.mean(dim=-1, keepdim=True)
        var = (wide - mean).square().mean(dim=-1, keepdim=True)
        normed = (wide - mean) * torch.rsqrt(var + self.eps)
        return (normed * self.scale + self.shift).to(x.dtype)


class GELU(nn.Module):
    """The tanh form, as in OpenAI's `gelu`; torch's default is the erf form, some 5e-4 away."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class FeedForward(nn.Module):
    """OpenAI's `mlp`: x [B, T, D] -> [B, T, F] -> [B, T, D]."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.n_embd, 4 * config.n_embd)
        self.gelu = GELU()
        self.out_proj = nn.Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        x = tap("mlp.pre", self.in_proj(x))  # [B, T, F]
        return tap("mlp.out", self.out_proj(tap("mlp.post", self.gelu(x))))  # [B, T, D]


class TransformerBlock(nn.Module):
    """OpenAI's `block`: LayerNorm before each branch, the branch added to the residual stream."""

    def __init__(self, config: GPTConfig, attention: str):
        super().__init__()
        self.norm1 = LayerNorm(config.n_embd)
        self.att = MultiHeadAttention(config, attention)
        self.norm2 = LayerNorm(config.n_embd)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: Tensor, cache: tuple[Tensor, Tensor] | None = None, slot: int = 0) -> Tensor:
        z = self.att(tap("ln_1", self.norm1(x)), mask, cache, slot)
        x = tap("resid_mid", x + self.dropout(z))  # [B, T, D]
        return tap("resid_post", x + self.dropout(self.ff(tap("ln_2", self.norm2(x)))))  # [B, T, D]


class GPTModel(nn.Module):
    """OpenAI's `model`: tokens [B, T] -> logits [B, T, V].

    `config`: a GPTConfig, a preset's name, or the notebook's dict. `seed`: of the initial weights,
    which equal those of gpt_jax.GPTModel with the same seed; None leaves torch's own.
    Dropout follows train() and eval(); a new model is in eval mode.
    """

    def __init__(self, config: GPTConfig | Mapping[str, Any] | str, seed: int | None = 0, attention: str = "explicit"):
        super().__init__()
        self.config = config = as_config(config)
        self.attention = attention
        self.tok_emb = nn.Embedding(config.n_vocab, config.n_embd)
        self.pos_emb = nn.Embedding(config.n_ctx, config.n_embd)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config, attention) for _ in range(config.n_layer))
        self.final_norm = LayerNorm(config.n_embd)
        if not config.tied_head:
            self.out_head = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        if seed is not None:
            load_weights(self, initial_weights(config, seed))
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens int [B, T] -> logits float32 [B, T, V].

        Raises InputError for ids outside the vocabulary and for T beyond the context.
        """
        return self._logits(self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads: tokens int [B, T] -> [B, T, D]. Raises as a call does."""
        self.config.check_tokens(tokens.shape)
        check_ids(tokens, self.config)
        T = tokens.shape[1]
        slots = torch.arange(T, device=tokens.device)
        mask = slots[None, :] <= slots[:, None]  # [T, S]
        x = self.tok_emb(tokens) + self.pos_emb(slots)  # [B, T, D]
        x = tap("embed", self.drop_emb(x))
        for number, block in enumerate(self.trf_blocks):
            taps.layer(number)
            x = block(x, mask)
        taps.layer(None)
        return tap("ln_f", self.final_norm(x))

    def decode(self, tokens: Tensor, cache: Cache, slot: int, first: Tensor) -> Tensor:
        """Logits [B, V] after the last of `tokens` [B, T], which take the cache slots from `slot` on.

        Row b begins at slot first[b]: earlier slots are padding, and positions count from there.
        The cache is written in place.
        """
        slots = torch.arange(cache[0][0].shape[1], device=tokens.device)  # [S]
        queries = slots[slot : slot + tokens.shape[1]]  # [T]
        mask = (slots <= queries[:, None]) & (slots >= first[:, None, None])  # [B, T, S]
        positions = (queries - first[:, None]).clamp(0, self.config.n_ctx - 1)  # [B, T]
        x = self.tok_emb(tokens) + self.pos_emb(positions)  # [B, T, D]
        for block, layer_cache in zip(self.trf_blocks, cache, strict=True):
            x = block(x, mask[:, None], layer_cache, slot)
        return self._logits(self.final_norm(x[:, -1]))

    def new_cache(self, batch: int, length: int) -> Cache:
        """Empty keys and values of `length` slots for each layer."""
        weight = self.tok_emb.weight
        shape = (batch, length, self.config.n_head, self.config.head_width)  # [B, S, N, H]
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.trf_blocks]

    def _logits(self, x: Tensor) -> Tensor:
        head = self.tok_emb if self.config.tied_head else self.out_head
        return tap("logits", at_least_float32(F.linear(x, head.weight)))  # [..., V]


def cast(model: GPTModel, dtype: torch.dtype | str) -> GPTModel:
    """The model with its parameters in `dtype`, in place; it then computes in it."""
    return model.to(getattr(torch, dtype) if isinstance(dtype, str) else dtype)


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_ids(tokens: Tensor, config: GPTConfig) -> None:
    """Raise InputError for an id outside the vocabulary; a traced or meta tensor has no ids yet."""
    if tokens.device.type == "meta" or torch.compiler.is_compiling():
        return
    low, high = tokens.aminmax()
    config.check_tokens(tokens.shape, int(low), int(high))
