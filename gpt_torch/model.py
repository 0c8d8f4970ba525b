"""GPT-2 in PyTorch. gpt_jax/model.py is the same model in Flax, line by line where possible.

Sources: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", and OpenAI's
code (openai/gpt-2, src/model.py). Axis letters: parity/config.py. The model computes in the dtype
of its parameters, except that LayerNorm, softmax and logits are computed in float32 at least.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_torch.modes import check_ids, unwrap, values
from gpt_torch.weights import load_weights
from parity import taps
from parity.config import LAYER_NORM_EPS, GPTConfig, as_config
from parity.errors import InputError, check_choice
from parity.taps import tap
from parity.weights import initial_weights

LayerCache = tuple[Tensor, Tensor]  # keys and values of one layer, both [B, S, N, H]
Cache = list[LayerCache]  # one entry per layer
ATTENTIONS = ("explicit", "sdpa")


def Embedding(num_embeddings: int, n_embd: int) -> nn.Embedding:
    # Torch would draw random weights, which are replaced. On the meta device it would import its compiler for that.
    return nn.Embedding(num_embeddings, n_embd, _weight=torch.zeros(num_embeddings, n_embd))


class MultiHeadAttention(nn.Module):
    """Causal self-attention (Vaswani et al. 2017, section 3.2.2; OpenAI's `attn`).

    x [B, T, D] -> [B, T, D]. `mask`: bool, broadcastable to [B, N, T, S], true where a query may attend.
    `attention`: "explicit", the formula as written here, or "sdpa", torch's fused kernel.
    """

    def __init__(self, config: GPTConfig, attention: str):
        super().__init__()
        self.qkv_shape = (3, config.n_head, config.head_width)  # [C, N, H]
        self.attention = attention
        self.qkv_proj = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.qkv_bias)
        self.out_proj = nn.Linear(config.n_embd, config.n_embd)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: Tensor, cache: LayerCache | None = None, slot: int = 0) -> Tensor:
        qkv = self.qkv_proj(x).unflatten(-1, self.qkv_shape)  # [B, T, C, N, H]
        q, k, v = qkv.unbind(2)  # each [B, T, N, H]
        q = tap("attn.q", q)
        k = tap("attn.k", k)
        v = tap("attn.v", v)
        if cache is not None:
            k, v = update_cache(cache, k, v, slot)  # each [B, S, N, H]
        if taps.attention(self.attention) == "explicit":
            z = self._explicit(q, k, v, mask)  # [B, T, N, H]
        else:
            z = self._sdpa(q, k, v, None if cache is None else mask)  # [B, T, N, H]
        z = tap("attn.z", z)
        return tap("attn.out", self.out_proj(z.flatten(2)))  # [B, T, D]

    def _explicit(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        scores = torch.einsum("BTNH,BSNH->BNTS", q, k) / math.sqrt(q.shape[-1])
        scores = tap("attn.scores", at_least_float32(scores))
        scores = torch.where(mask, scores, torch.finfo(scores.dtype).min)
        pattern = tap("attn.pattern", torch.softmax(scores, dim=-1).to(v.dtype))
        return torch.einsum("BNTS,BSNH->BTNH", self.dropout(pattern), v)

    def _sdpa(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [B, N, T, H]
        drop_rate = self.dropout.p if self.training else 0.0
        z = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=mask is None)
        return z.transpose(1, 2)


class LayerNorm(nn.Module):
    """LayerNorm with the biased variance (Ba et al. 2016; OpenAI's `norm`). x [..., D] -> [..., D]."""

    def __init__(self, n_embd: int):
        super().__init__()
        self.eps = LAYER_NORM_EPS
        self.scale = nn.Parameter(torch.ones(n_embd))
        self.shift = nn.Parameter(torch.zeros(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        x32 = at_least_float32(x)
        mean = x32.mean(dim=-1, keepdim=True)
        var = torch.square(x32 - mean).mean(dim=-1, keepdim=True)
        normed = (x32 - mean) * torch.rsqrt(var + self.eps)
        return (normed * self.scale + self.shift).to(x.dtype)


class GELU(nn.Module):
    """GELU in its tanh form (Hendrycks & Gimpel 2016; OpenAI's `gelu`). torch's default, erf, differs by up to 5e-4."""

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
        h = tap("mlp.pre", self.in_proj(x))  # [B, T, F]
        h = tap("mlp.post", self.gelu(h))  # [B, T, F]
        return tap("mlp.out", self.out_proj(h))  # [B, T, D]


class TransformerBlock(nn.Module):
    """OpenAI's `block`: x + att(norm1(x)), then x + ff(norm2(x)). x [B, T, D] -> [B, T, D]."""

    def __init__(self, config: GPTConfig, attention: str):
        super().__init__()
        self.norm1 = LayerNorm(config.n_embd)
        self.att = MultiHeadAttention(config, attention)
        self.norm2 = LayerNorm(config.n_embd)
        self.ff = FeedForward(config)
        self.dropout = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, mask: Tensor, cache: LayerCache | None = None, slot: int = 0) -> Tensor:
        h = tap("ln_1", self.norm1(x))  # [B, T, D]
        h = self.att(h, mask, cache, slot)  # [B, T, D]
        x = tap("resid_mid", x + self.dropout(h))  # [B, T, D]
        h = tap("ln_2", self.norm2(x))  # [B, T, D]
        h = self.ff(h)  # [B, T, D]
        return tap("resid_post", x + self.dropout(h))  # [B, T, D]


class GPTModel(nn.Module):
    """GPT-2: tokens [B, T] -> logits [B, T, V] (Radford et al. 2019; `model` in openai/gpt-2 src/model.py).

    Dropout is applied in train mode only; a new model is in eval mode. To generate text, use gpt_torch.generate.

    Args:
        config: A GPTConfig, the name of a preset, or a dict with the notebook's keys.
        seed: Seed of the initial weights, which equal those of gpt_jax.GPTModel with the same seed. None leaves
            those of torch's layers, for a model whose weights are loaded next.
        attention: "explicit" or "sdpa"; see MultiHeadAttention.

    Raises:
        InputError: For an unknown preset or attention, and for a configuration that is not valid.
    """

    def __init__(self, config: GPTConfig | Mapping[str, Any] | str, seed: int | None = 0, attention: str = "explicit"):
        super().__init__()
        check_choice("attention", attention, ATTENTIONS)
        self.config = config = as_config(config)
        self.attention = attention
        self.tok_emb = Embedding(config.n_vocab, config.n_embd)
        self.pos_emb = Embedding(config.n_ctx, config.n_embd)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.ModuleList(TransformerBlock(config, attention) for _ in range(config.n_layer))
        self.final_norm = LayerNorm(config.n_embd)
        if not config.tied_head:
            self.out_head = nn.Linear(config.n_embd, config.n_vocab, bias=False)
        if seed is not None and values(self.tok_emb.weight) is not None:  # torch.device("meta") has no values
            load_weights(self, initial_weights(config, seed))
        self.eval()

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of the next token at each position.

        Args:
            tokens: Integer ids [B, T].

        Returns:
            Logits [B, T, V], float32 (float64 if the parameters are).

        Raises:
            InputError: If T exceeds n_ctx or an id is outside the vocabulary.
        """
        return head_logits(self, self.hidden(tokens))

    def hidden(self, tokens: Tensor) -> Tensor:
        """Return the input of the output head: the normalized residual stream [B, T, D], in the parameters' dtype.

        Args:
            tokens: Integer ids [B, T].

        Raises:
            InputError: If T exceeds n_ctx or an id is outside the vocabulary.
        """
        self.config.check_tokens(tokens.shape)
        check_ids(tokens, self.config)
        slots = torch.arange(tokens.shape[1], device=tokens.device)  # [T]
        mask = slots[None, :] <= slots[:, None]  # [T, S]
        x = self.tok_emb(tokens) + self.pos_emb(slots)  # [B, T, D]
        x = tap("embed", self.drop_emb(x))  # [B, T, D]
        for number, block in enumerate(self.trf_blocks):
            taps.layer(number)
            x = block(x, mask)  # [B, T, D]
        taps.layer(None)
        return tap("ln_f", self.final_norm(x))  # [B, T, D]

    def decode(self, tokens: Tensor, cache: Cache, slot: int, pad_lengths: Tensor) -> Tensor:
        """Return the logits of the token after `tokens`, and write the keys and values of `tokens` into the cache.

        Args:
            tokens: Integer ids [B, T], for the cache slots slot..slot+T-1.
            cache: The result of new_cache(), keys and values [B, S, N, H] in the dtype of the parameters; it is
                changed in place.
            slot: The first slot to write.
            pad_lengths: int [B]. The first pad_lengths[b] slots of row b are padding: they are not attended to,
                and positions count from the slot after them.

        Returns:
            Logits [B, V], in float32 at least.
        """
        slots = torch.arange(cache[0][0].shape[1], device=tokens.device)  # [S]
        queries = slots[slot : slot + tokens.shape[1]]  # [T]
        mask = (slots <= queries[:, None]) & (slots >= pad_lengths[:, None, None])  # [B, T, S]
        positions = (queries - pad_lengths[:, None]).clamp(0, self.config.n_ctx - 1)  # [B, T]
        x = self.tok_emb(tokens) + self.pos_emb(positions)  # [B, T, D]
        for block, layer_cache in zip(self.trf_blocks, cache, strict=True):
            x = block(x, mask[:, None], layer_cache, slot)  # [B, T, D]
        x = self.final_norm(x[:, -1])  # [B, D]
        return head_logits(self, x)

    def new_cache(self, batch_size: int, length: int) -> Cache:
        """Return an empty key/value cache for decode().

        Args:
            batch_size: Number of rows, B.
            length: Number of tokens that it has room for, S.

        Returns:
            For each layer a pair of zero-filled keys and values, both [B, S, N, H] in the dtype of the parameters.
        """
        weight = self.tok_emb.weight
        shape = (batch_size, length, self.config.n_head, self.config.head_width)  # [B, S, N, H]
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in self.trf_blocks]


def head_logits(model: GPTModel, x: Tensor) -> Tensor:
    """Apply the output head: x [..., D] -> logits [..., V], in float32 at least."""
    head = model.tok_emb if model.config.tied_head else model.out_head
    logits = F.linear(x, head.weight)  # [..., V]
    return tap("logits", at_least_float32(logits))


def cast(model: nn.Module, dtype: torch.dtype | str) -> GPTModel:
    """Return a copy of a model in another dtype, in which the copy computes.

    Args:
        model: The model; it is not changed (model.to() converts in place).
        dtype: A torch dtype or its name, such as "bfloat16".

    Returns:
        A copy of the model with converted parameters.

    Raises:
        InputError: If the dtype is not a floating-point dtype.
    """
    gpt: GPTModel = unwrap(model)
    torch_dtype = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(torch_dtype, torch.dtype) or not torch_dtype.is_floating_point:
        raise InputError(f"dtype {dtype!r:.60}: a model needs a floating-point dtype, such as float32 or bfloat16")
    copies: dict[int, Any] = {
        id(p): nn.Parameter(p.detach().to(torch_dtype, copy=True), p.requires_grad) for p in gpt.parameters()
    }
    return copy.deepcopy(gpt, copies)  # takes the parameters from `copies`


def at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def update_cache(cache: LayerCache, k: Tensor, v: Tensor, slot: int) -> LayerCache:
    """Write k and v [B, T, N, H] at `slot` of the cache, in place, and return all of its keys and values."""
    keys, values = cache
    keys[:, slot : slot + k.shape[1]] = k
    values[:, slot : slot + v.shape[1]] = v
    return cache
