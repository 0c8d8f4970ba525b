# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
"""
# GPT-2 from scratch, in PyTorch and in JAX

This notebook builds GPT-2 step by step: tokens, windows, attention, the block, the model, the loss, training,
decoding, saving, OpenAI's weights, a look inside, and tuning. Every piece is written twice, in PyTorch and beside it
in JAX, and compared with this project's own: the batches, each part of the model, the loss and its gradient, the
evaluation, training steps, greedy and sampled tokens, and LoRA. Every number is computed here, and every claim is an
`assert`: if the last cell prints its list, all of them hold.

## Quick Start

To open the notebook in Jupyter, run this in the folder of the project, and then run all cells from top to bottom:

```
make setup EXTRAS=jax,torch
source .venv/bin/activate
pip install --constraint constraints.txt jupyterlab
jupyter lab docs/notebook.ipynb
```

- **Time:** less than two minutes on two quiet CPU cores; most of it is training, once in each framework.
- **Hardware:** a CPU. A GPU is not needed, and is not used if there is one, because the model is small.
- **Network:** not needed once the packages are installed. If OpenAI's 124M is in the cache or can be downloaded (498
  MB), the section on OpenAI's weights uses it. To forbid the download, set the environment variable
  `GPT_PARITY_OFFLINE=1` before you start.
- **What should come out:** a sample of text before training and one after it; a validation loss below that of the
  best bigram model; the same losses and the same sampled tokens in both frameworks.
- **Files:** all are written into the folder `output`, beside the notebook: the figure `loss-plot.pdf`; the models
  `model.pth` with its `config.json`, `model_and_optimizer.pth`, and `params.npz`; the folder `adapter` of LoRA; and, if
  OpenAI's 124M cannot be had, the folder `gpt2/small` in its format.

The names are those of the original notebook, from which this project grew and which follows Sebastian Raschka's book
*Build a Large Language Model (From Scratch)*. In JAX the model is a set of plain functions of a parameter tree, which
is how JAX code is written without a library of layers: `MultiHeadAttention` in PyTorch is `multi_head_attention` in
JAX. Where a name would be the same in both, JAX's ends in `_jax`.
"""

# %%
import importlib.util
import subprocess
import sys
from pathlib import Path

# Set this only if the notebook is not in a copy of its repository, such as on a hosted notebook service (not tried
# there yet): the address of the repository that you opened it from, https://...
REPOSITORY = ""

if any(importlib.util.find_spec(name) is None for name in ("gpt_torch", "gpt_jax", "torch", "jax", "flax", "optax")):
    clone = Path.cwd().parent
    if (clone / "gpt_torch" / "notebook.py").is_file():
        packages = [f"{clone}[jax,torch]", "--constraint", f"{clone / 'constraints.txt'}"]
    else:
        assert REPOSITORY, "gpt-parity is not installed here: set REPOSITORY above to the address of its repository"
        packages = [f"gpt-parity[jax,torch] @ git+{REPOSITORY}"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
    importlib.invalidate_caches()

# %%
import os

# These take effect only before JAX is imported. The model is so small that a second thread costs more than it brings.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("XLA_FLAGS", "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1")

import collections
import contextlib
import functools
import io
import itertools
import json
import math
import time

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
import torch
from torch import nn

import gpt_jax
import gpt_jax.model
import gpt_jax.notebook
import gpt_torch
import gpt_torch.model
import gpt_torch.notebook
from parity import as_config, load_tokenizer
from parity.arrays import as_numpy
from parity.comparison.error_bounds import activation_bounds
from parity.data.windows import order
from parity.notebook import download_and_load_gpt2, flatten, nest
from parity.sampling import uniforms
from parity.weights import convert, initial_weights, shapes

torch.set_num_threads(1)
OUTPUT = Path("output")  # everything that is written
OUTPUT.mkdir(exist_ok=True)
START = time.perf_counter()
print("torch", torch.__version__, "and jax", jax.__version__)

# %% [markdown]
"""
## 1. Text to tokens

A model reads numbers, so text becomes a list of token ids. The text here is Python's own help, which every Python
installation contains.

The simplest tokens are the 256 bytes of UTF-8. GPT-2 starts from the bytes as well and then merges: the most frequent
pair of adjacent tokens becomes a new token, again and again (byte pair encoding). Here are a few merges, learned from
the beginning of the text.
"""

# %%
from pydoc_data.topics import topics

text = "\n\n".join(topics[topic] for topic in sorted(topics))


def merge(ids: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace each occurrence of a pair of adjacent tokens by a new token."""
    merged, i = [], 0
    while i < len(ids):
        if tuple(ids[i : i + 2]) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(ids[i])
            i += 1
    return merged


vocabulary = {byte: bytes([byte]) for byte in range(256)}
ids = list(text[:20_000].encode("utf-8"))
n_bytes = len(ids)
for new in range(256, 286):
    [(pair, _)] = collections.Counter(itertools.pairwise(ids)).most_common(1)
    vocabulary[new] = vocabulary[pair[0]] + vocabulary[pair[1]]
    ids = merge(ids, pair, new)
print("merged:", [vocabulary[new].decode() for new in range(256, 286)])
print(f"{n_bytes} bytes -> {len(ids)} tokens after {len(vocabulary) - 256} merges")
assert b"".join(vocabulary[id] for id in ids) == text[:20_000].encode("utf-8")  # nothing is lost
assert len(ids) < 0.75 * n_bytes

# %% [markdown]
"""
GPT-2's vocabulary is 256 bytes, 50,000 merges and the token `<|endoftext|>`, 50,257 in all; `load_tokenizer("gpt2")`
reads it from OpenAI's file `vocab.bpe`. A model this small learns more from bytes, so the rest of the notebook uses
the tokenizer `bytes`: 257 tokens, the last of which is `<|endoftext|>`.
"""

# %%
tokenizer = load_tokenizer("bytes")
print(tokenizer.encode("Hello, world<|endoftext|>", allowed_special={"<|endoftext|>"}))
assert tokenizer.decode(tokenizer.encode("Grüße, 世界")) == "Grüße, 世界"

# %% [markdown]
"""
## 2. Windows and batches

A training example is a window of the text, and its targets are the same window one token later: at each position the
model predicts the next token. `stride` is the distance between the starts of two windows. The order of an epoch is a
function of the seed and the number of the epoch alone, so both frameworks see the same batches.
"""


# %%
class GPTDatasetV1:
    """Windows over a text: item i is (inputs, targets), both int64 [T]."""

    def __init__(self, txt: str, tokenizer, max_length: int, stride: int):
        token_ids = np.array(tokenizer.encode(txt, allowed_special={"<|endoftext|>"}), np.int64)
        starts = range(0, len(token_ids) - max_length, stride)
        self.input_ids = np.stack([token_ids[i : i + max_length] for i in starts])  # [windows, T]
        self.target_ids = np.stack([token_ids[i + 1 : i + max_length + 1] for i in starts])  # [windows, T]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index):
        return self.input_ids[index], self.target_ids[index]


class DataLoader:
    """Batches (inputs, targets), both [B, T], of a dataset; iterating over it again is the next epoch."""

    def __init__(self, dataset: GPTDatasetV1, batch_size: int, shuffle: bool, seed: int):
        self.dataset, self.batch_size, self.shuffle, self.seed, self.epoch = dataset, batch_size, shuffle, seed, 0

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size  # a last, smaller batch is left out

    def __iter__(self):
        count = len(self.dataset)
        indices = order(self.seed, self.epoch, count) if self.shuffle else np.arange(count)
        self.epoch += 1
        for batch in range(len(self)):
            yield self.dataset[indices[batch * self.batch_size : (batch + 1) * self.batch_size]]


def create_dataloader_v1(txt, batch_size=4, max_length=256, stride=128, shuffle=True, seed=0) -> DataLoader:
    return DataLoader(GPTDatasetV1(txt, tokenizer, max_length, stride), batch_size, shuffle, seed)


inputs, targets = next(iter(create_dataloader_v1(text, batch_size=2, max_length=8, stride=4, shuffle=False)))
for row, target in zip(inputs, targets, strict=True):
    print(repr(tokenizer.decode(row)), "->", repr(tokenizer.decode(target)))
assert np.array_equal(inputs[:, 1:], targets[:, :-1])
assert np.array_equal(inputs[0, 4:], inputs[1, :4])  # the stride

ours = create_dataloader_v1(text[:5000], batch_size=3, max_length=16, stride=7, seed=5)
theirs = gpt_torch.notebook.create_dataloader_v1(text[:5000], 3, 16, 7, seed=5, tokenizer=tokenizer)
for _ in range(2):  # two epochs
    for (x, y), (their_x, their_y) in zip(ours, theirs, strict=True):
        assert np.array_equal(x, their_x)
        assert np.array_equal(y, their_y)
print("the batches of two epochs are those of the package")

# %% [markdown]
"""
## 3. Attention

The configuration has the names of the original notebook. The model has GPT-2's architecture with smaller numbers.

Axis letters in the comments, as in the whole project: B batch, T query positions, S key positions, D model width, N
heads, H head width, F width of the feed-forward layer (4 D), V vocabulary.
"""

# %%
GPT_CONFIG = {
    "vocab_size": 257,
    "context_length": 32,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,  # the JAX functions below have no dropout; the original notebook trains with 0.1
    "qkv_bias": True,
    "tied_head": True,  # the output head is the token embedding, as in GPT-2
}
config = as_config(GPT_CONFIG)

# %% [markdown]
"""
How do we know that a piece is right? The package's models compute the activations of some random weights and tokens,
and each piece below gets the package's input of that piece and must return the package's output. The two need not be
equal in every bit, because sums may be computed in another order. The bound is what rounding in float32 can cause,
derived by `parity.comparison.error_bounds`.

The weights are in OpenAI's layout, nested as the original notebook nests them:
`params["blocks"][0]["attn"]["c_attn"]["w"]` is the matrix [D, 3 D] of the first layer's queries, keys and values. This
tree is also what the JAX functions take.
"""

# %%
rng = np.random.default_rng(0)
SCALE = {"wte.weight": 0.15, "wpe.weight": 0.1}  # small, so that LayerNorm's eps matters
random_weights = {
    name: (rng.normal(size=shape) * SCALE.get(name, 0.2) + (".ln_" in name and "weight" in name)).astype(np.float32)
    for name, shape in shapes(config, "huggingface").items()
}


def to_params(weights: dict) -> dict:
    """Return weights in the huggingface format as the original notebook nests OpenAI's."""
    return nest(config, dict(convert(weights, "huggingface", "openai", config)))


params = to_params(random_weights)
params_jax = jax.tree.map(jnp.asarray, params)
batch = rng.integers(0, config.n_vocab, (2, 25))
inputs, targets = batch[:, :-1], batch[:, 1:]  # both [B, T]

theirs_torch = gpt_torch.GPTModel(config, seed=None)
gpt_torch.load_weights(theirs_torch, random_weights)
theirs_jax = gpt_jax.GPTModel(config, seed=None)
gpt_jax.load_weights(theirs_jax, random_weights)
with torch.no_grad():
    logits, cache = gpt_torch.run_with_cache(theirs_torch, torch.tensor(inputs))
cache = {name: as_numpy(activation) for name, activation in cache.items()}
_, bounds = activation_bounds(config, random_weights, inputs, "float32", list(cache))


def check(name: str, ours, theirs=None, bound: float | None = None) -> None:
    """Raise AssertionError unless `ours` is within the bound of the package's activation of this name."""
    theirs = cache[name] if theirs is None else theirs
    bound = bounds[name] if bound is None else bound
    difference = np.abs(as_numpy(ours, np.float64) - as_numpy(theirs, np.float64)).max()
    print(f"{name:22} {list(ours.shape)!s:17} largest difference {difference:.1e}, bound {bound:.1e}")
    assert difference <= bound


# %% [markdown]
"""
Each position makes a query, and each position offers a key and a value. The scores are the products of queries and
keys, divided by the root of the head's width; a position may not look at later ones, so these scores become minus
infinity. The softmax of the scores is the pattern, whose rows sum to 1, and the output is the average of the values
weighted by it. N heads do this side by side, each on its own part of the width.

`load_attention` copies OpenAI's weights into the PyTorch module. Two things differ: OpenAI has queries, keys and
values in one matrix, and stores matrices as [in, out], where PyTorch has [out, in]. A square matrix that is not
transposed raises no error, and the model is wrong; the check sees it. JAX's functions take OpenAI's tree as it is.
"""


# %% tags=["torch"]
class MultiHeadAttention(nn.Module):
    """x [B, T, D] -> [B, T, D]"""

    def __init__(self, d_in, d_out, context_length, dropout, num_heads, qkv_bias=False):
        super().__init__()
        self.num_heads = num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        later = torch.triu(torch.ones(context_length, context_length, dtype=torch.bool), diagonal=1)
        self.register_buffer("mask", later)

    def split_heads(self, x):
        return x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, N, T, H]

    def forward(self, x):
        T = x.shape[1]
        queries = self.split_heads(self.W_query(x))
        keys = self.split_heads(self.W_key(x))
        values = self.split_heads(self.W_value(x))
        scores = queries @ keys.transpose(2, 3) / math.sqrt(keys.shape[-1])  # [B, N, T, S]
        scores = scores.masked_fill(self.mask[:T, :T], -torch.inf)
        pattern = torch.softmax(scores, dim=-1)
        context = self.dropout(pattern) @ values  # [B, N, T, H]
        return self.out_proj(context.transpose(1, 2).flatten(2))


def assign(parameter, array):
    """Copy an array into a parameter of the same shape."""
    assert tuple(parameter.shape) == array.shape, f"{tuple(parameter.shape)} is not {array.shape}"
    with torch.no_grad():
        parameter.copy_(torch.from_numpy(np.array(array)))


def load_linear(layer, w, b):
    assign(layer.weight, w.T)
    assign(layer.bias, b)


def load_attention(att, attn):
    parts = zip(*(np.split(attn["c_attn"][name], 3, axis=-1) for name in "wb"), strict=True)
    for layer, (w, b) in zip((att.W_query, att.W_key, att.W_value), parts, strict=True):
        load_linear(layer, w, b)
    load_linear(att.out_proj, **attn["c_proj"])


attention = MultiHeadAttention(config.n_embd, config.n_embd, config.n_ctx, 0.0, config.n_head, qkv_bias=True)
load_attention(attention, params["blocks"][0]["attn"])
check("blocks.0.attn.out", attention(torch.tensor(cache["blocks.0.ln_1"])))


# %% tags=["jax"]
def linear(layer, x):
    """x [..., in] -> [..., out]; OpenAI stores matrices as [in, out]."""
    return x @ layer["w"] + layer["b"]


def multi_head_attention(attn, x, num_heads):
    """x [B, T, D] -> [B, T, D]"""
    B, T, D = x.shape
    qkv = jnp.split(linear(attn["c_attn"], x), 3, axis=-1)  # three of [B, T, D]
    queries, keys, values = (part.reshape(B, T, num_heads, -1).swapaxes(1, 2) for part in qkv)  # [B, N, T, H]
    scores = queries @ keys.swapaxes(2, 3) / math.sqrt(keys.shape[-1])  # [B, N, T, S]
    later = jnp.triu(jnp.ones((T, T), bool), k=1)
    pattern = jax.nn.softmax(jnp.where(later, -jnp.inf, scores), axis=-1)
    context = (pattern @ values).swapaxes(1, 2)  # [B, T, N, H]
    return linear(attn["c_proj"], context.reshape(B, T, D))


check("blocks.0.attn.out", multi_head_attention(params_jax["blocks"][0]["attn"], cache["blocks.0.ln_1"], config.n_head))

# %% [markdown]
"""
## 4. LayerNorm, GELU, feed-forward, block

LayerNorm subtracts the mean of each position's vector and divides by its standard deviation. The variance is the
biased one (divided by D), and `eps` is 1e-5; Flax's own default is 1e-6, which is a classic mistake. GELU is the tanh
form, which is not PyTorch's default.
"""


# %% tags=["torch"]
class LayerNorm(nn.Module):
    """x [..., D] -> [..., D]"""

    def __init__(self, emb_dim):
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x):
        mean = x.mean(dim=-1, keepdim=True)
        var = x.var(dim=-1, keepdim=True, unbiased=False)
        return (x - mean) / torch.sqrt(var + self.eps) * self.scale + self.shift


class GELU(nn.Module):
    def forward(self, x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


class FeedForward(nn.Module):
    """x [B, T, D] -> [B, T, F] -> [B, T, D]"""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(cfg["emb_dim"], 4 * cfg["emb_dim"]),
            GELU(),
            nn.Linear(4 * cfg["emb_dim"], cfg["emb_dim"]),
        )

    def forward(self, x):
        return self.layers(x)


def load_norm(norm, source):
    assign(norm.scale, source["g"])
    assign(norm.shift, source["b"])


def load_feed_forward(ff, mlp):
    load_linear(ff.layers[0], **mlp["c_fc"])
    load_linear(ff.layers[2], **mlp["c_proj"])


norm, ff = LayerNorm(config.n_embd), FeedForward(GPT_CONFIG)
load_norm(norm, params["blocks"][0]["ln_1"])
load_feed_forward(ff, params["blocks"][0]["mlp"])
check("blocks.0.ln_1", norm(torch.tensor(cache["embed"])))
grid = np.linspace(-4, 4, 1001, dtype=np.float32)
GELU_BOUND = 2.0**-19  # a few roundings of numbers up to 4
check("GELU", GELU()(torch.tensor(grid)), gpt_torch.model.GELU()(torch.tensor(grid)), GELU_BOUND)
check("blocks.0.mlp.out", ff(torch.tensor(cache["blocks.0.ln_2"])))


# %% tags=["jax"]
def layer_norm(ln, x):
    """x [..., D] -> [..., D]"""
    mean = x.mean(axis=-1, keepdims=True)
    var = x.var(axis=-1, keepdims=True)
    return (x - mean) / jnp.sqrt(var + 1e-5) * ln["g"] + ln["b"]


def gelu(x):
    return 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def feed_forward(mlp, x):
    """x [B, T, D] -> [B, T, F] -> [B, T, D]"""
    return linear(mlp["c_proj"], gelu(linear(mlp["c_fc"], x)))


check("blocks.0.ln_1", layer_norm(params_jax["blocks"][0]["ln_1"], cache["embed"]))
check("GELU", gelu(grid), gpt_jax.model.GELU()(jnp.asarray(grid)), GELU_BOUND)
check("blocks.0.mlp.out", feed_forward(params_jax["blocks"][0]["mlp"], cache["blocks.0.ln_2"]))

# %% [markdown]
"""
A block adds to its input twice: what attention reads from other positions, then what the feed-forward layer computes
from each position. Both get a normalized copy of the input (pre-norm).
"""


# %% tags=["torch"]
class TransformerBlock(nn.Module):
    """x [B, T, D] -> [B, T, D]"""

    def __init__(self, cfg):
        super().__init__()
        self.att = MultiHeadAttention(
            d_in=cfg["emb_dim"],
            d_out=cfg["emb_dim"],
            context_length=cfg["context_length"],
            dropout=cfg["drop_rate"],
            num_heads=cfg["n_heads"],
            qkv_bias=cfg["qkv_bias"],
        )
        self.ff = FeedForward(cfg)
        self.norm1 = LayerNorm(cfg["emb_dim"])
        self.norm2 = LayerNorm(cfg["emb_dim"])
        self.drop_shortcut = nn.Dropout(cfg["drop_rate"])

    def forward(self, x):
        x = x + self.drop_shortcut(self.att(self.norm1(x)))
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


def load_block(block, source):
    load_norm(block.norm1, source["ln_1"])
    load_attention(block.att, source["attn"])
    load_norm(block.norm2, source["ln_2"])
    load_feed_forward(block.ff, source["mlp"])


block = TransformerBlock(GPT_CONFIG)
load_block(block, params["blocks"][0])
check("blocks.0.resid_post", block(torch.tensor(cache["embed"])))


# %% tags=["jax"]
def transformer_block(block, x, num_heads):
    """x [B, T, D] -> [B, T, D]"""
    x = x + multi_head_attention(block["attn"], layer_norm(block["ln_1"], x), num_heads)
    return x + feed_forward(block["mlp"], layer_norm(block["ln_2"], x))


check("blocks.0.resid_post", transformer_block(params_jax["blocks"][0], cache["embed"], config.n_head))

# %% [markdown]
"""
## 5. The model

Token and position embeddings are added, the blocks follow, then a last LayerNorm and the output head, whose matrix is
that of the token embedding. The result is a logit for each token of the vocabulary at each position.
"""


# %% tags=["torch"]
class GPTModel(nn.Module):
    """tokens [B, T] -> logits [B, T, V]"""

    def __init__(self, cfg):
        super().__init__()
        self.tok_emb = nn.Embedding(cfg["vocab_size"], cfg["emb_dim"])
        self.pos_emb = nn.Embedding(cfg["context_length"], cfg["emb_dim"])
        self.drop_emb = nn.Dropout(cfg["drop_rate"])
        self.trf_blocks = nn.Sequential(*[TransformerBlock(cfg) for _ in range(cfg["n_layers"])])
        self.final_norm = LayerNorm(cfg["emb_dim"])
        self.out_head = nn.Linear(cfg["emb_dim"], cfg["vocab_size"], bias=False)
        self.out_head.weight = self.tok_emb.weight  # tied

    def forward(self, in_idx):
        positions = torch.arange(in_idx.shape[1], device=in_idx.device)
        x = self.drop_emb(self.tok_emb(in_idx) + self.pos_emb(positions))  # [B, T, D]
        x = self.final_norm(self.trf_blocks(x))
        return self.out_head(x)


def load_weights_into_gpt(gpt, params):
    """Copy OpenAI's weights, as nested by `download_and_load_gpt2`, into a GPTModel."""
    assign(gpt.tok_emb.weight, params["wte"])
    assign(gpt.pos_emb.weight, params["wpe"])
    load_norm(gpt.final_norm, params)  # its "g" and "b" are at the top of the tree
    for block, source in zip(gpt.trf_blocks, params["blocks"], strict=True):
        load_block(block, source)


model = GPTModel(GPT_CONFIG)
load_weights_into_gpt(model, params)
with torch.no_grad():
    check("logits", model(torch.tensor(inputs)))
print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")


# %% tags=["jax"]
@functools.partial(jax.jit, static_argnames="num_heads")
def gpt_model(params, tokens, num_heads=GPT_CONFIG["n_heads"]):
    """tokens [B, T] -> logits [B, T, V]"""
    x = params["wte"][tokens] + params["wpe"][: tokens.shape[1]]  # [B, T, D]
    for block in params["blocks"]:
        x = transformer_block(block, x, num_heads)
    x = layer_norm(params, x)
    return x @ params["wte"].T


check("logits", gpt_model(params_jax, inputs))
check("logits", gpt_model(params_jax, inputs), theirs=theirs_jax(jnp.asarray(inputs, jnp.int32)))
print(f"{sum(leaf.size for leaf in jax.tree.leaves(params_jax)):,} parameters")

# %% [markdown]
"""
## 6. The loss

The loss is the cross-entropy: the mean of -log p of the right next token, in nats per token. A model that knows
nothing has log 257 = 5.55. The perplexity is exp(loss): the number of equally probable tokens that would be as hard to
guess from.

The loss cannot change by more than twice the largest change of a logit, so the tolerance is twice the bound of the
logits. That is not quite a bound, since the softmax and the mean round as well. For the gradient, the tolerance is
1e-4 of its largest element, a number that we chose.
"""


# %% tags=["torch"]
def calc_loss_batch(input_batch, target_batch, model):
    logits = model(torch.as_tensor(input_batch))  # [B, T, V]
    return nn.functional.cross_entropy(logits.flatten(0, 1), torch.as_tensor(target_batch).flatten())


def calc_loss_loader(data_loader, model, num_batches=None):
    """Return the mean loss of the first batches, or of all."""
    with torch.no_grad():
        losses = [calc_loss_batch(*batch, model).item() for batch in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses)


loss = calc_loss_batch(inputs, targets, model)
theirs = gpt_torch.notebook.calc_loss_batch(torch.tensor(inputs), torch.tensor(targets), theirs_torch)
check("loss", loss, theirs, bound=2 * bounds["logits"])
loss.backward()
theirs.backward()
gradient = model.tok_emb.weight.grad
check("its gradient", gradient, theirs_torch.tok_emb.weight.grad, bound=1e-4 * float(gradient.abs().max()))


# %% tags=["jax"]
@jax.jit
def calc_loss_batch_jax(params, input_batch, target_batch):
    log_probs = jax.nn.log_softmax(gpt_model(params, input_batch))  # [B, T, V]
    return -jnp.take_along_axis(log_probs, target_batch[..., None], axis=-1).mean()


def calc_loss_loader_jax(data_loader, params, num_batches=None):
    """Return the mean loss of the first batches, or of all."""
    losses = [float(calc_loss_batch_jax(params, *batch)) for batch in itertools.islice(data_loader, num_batches)]
    return sum(losses) / len(losses)


loss_jax, gradients = jax.value_and_grad(calc_loss_batch_jax)(params_jax, inputs, targets)
check("loss", loss_jax, theirs, bound=2 * bounds["logits"])
check("its gradient", gradients["wte"], gradient, bound=1e-4 * float(gradient.abs().max()))

# %% [markdown]
"""
## 7. Training

The last tenth of the text is for validation. The bigram model is the baseline: it predicts each token from the one
before it alone, from the counts of the training text. Whatever is below its loss has been learned from a longer
context.
"""

# %%
from parity.training.bigram import bigram_loss

split = int(0.9 * len(text))
train_ids, val_ids = (np.array(tokenizer.encode(part), np.uint16) for part in (text[:split], text[split:]))
bigram = bigram_loss([train_ids], [val_ids], config.n_vocab)
print(f"{len(train_ids):,} training tokens, {len(val_ids):,} validation tokens; bigram: {bigram:.3f} nats per token")

SETTINGS = {"num_epochs": 1, "eval_freq": 80, "eval_iter": 50, "start_context": "The value of "}
LEARNING_RATE, WEIGHT_DECAY, BETAS = 5e-3, 0.1, (0.9, 0.95)


def adamw(model):
    return torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY)


adamw_jax = optax.adamw(LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=WEIGHT_DECAY)
initial = to_params(initial_weights(config, seed=123))  # the same for both frameworks
initial_jax = jax.tree.map(jnp.asarray, initial)

# %% [markdown]
"""
Greedy decoding takes the most probable token again and again; when the text is longer than the context, the model sees
its last tokens only. PyTorch runs whatever length it gets. JAX compiles a program per shape, so its window always has
the full length: what follows the text does not matter, since no position looks at later ones.
"""


# %% tags=["torch"]
def generate_text_simple(model, idx, max_new_tokens, context_size):
    """ids [B, T] -> ids [B, T + max_new_tokens]"""
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1]  # [B, V]
        idx = torch.cat([idx, logits.argmax(dim=-1, keepdim=True)], dim=1)
    return idx


def generate_and_print_sample(model, tokenizer, start_context):
    model.eval()
    idx = torch.tensor([tokenizer.encode(start_context)])
    [row] = generate_text_simple(model, idx, max_new_tokens=50, context_size=config.n_ctx)
    print("   ", repr(tokenizer.decode(row.tolist())))
    model.train()


def evaluate_model(model, train_loader, val_loader, eval_iter):
    """Return the mean losses of training and validation batches, without dropout."""
    model.eval()
    losses = [calc_loss_loader(loader, model, eval_iter) for loader in (train_loader, val_loader)]
    model.train()
    return losses


def train_model_simple(
    model, train_loader, val_loader, optimizer, num_epochs, eval_freq, eval_iter, start_context, tokenizer
):
    """Return the losses on training and validation batches, and the tokens seen, at each evaluation."""
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, 0
    for epoch in range(num_epochs):
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            calc_loss_batch(input_batch, target_batch, model).backward()
            optimizer.step()
            tokens_seen += input_batch.size
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Epoch {epoch + 1}, step {global_step:04d}: {train_loss:.3f} {val_loss:.3f}")
            global_step += 1
        generate_and_print_sample(model, tokenizer, start_context)
    return train_losses, val_losses, track_tokens_seen


# %% tags=["jax"]
@functools.partial(jax.jit, static_argnames="num_heads")
def next_logits(params, window, length, num_heads=GPT_CONFIG["n_heads"]):
    """window [B, T], of which `length` tokens count -> logits [B, V] of the next token"""
    return gpt_model(params, window, num_heads)[:, length - 1]


def generate_text_simple_jax(params, idx, max_new_tokens, context_size):
    """ids [B, T] -> ids [B, T + max_new_tokens]"""
    for _ in range(max_new_tokens):
        window = idx[:, -context_size:]
        length = window.shape[1]
        window = np.pad(window, ((0, 0), (0, context_size - length)))
        logits = next_logits(params, window, length)  # [B, V]
        idx = np.concatenate([idx, logits.argmax(axis=-1, keepdims=True)], axis=1)
    return idx


def generate_and_print_sample_jax(params, tokenizer, start_context):
    idx = np.array([tokenizer.encode(start_context)])
    [row] = generate_text_simple_jax(params, idx, max_new_tokens=50, context_size=config.n_ctx)
    print("   ", repr(tokenizer.decode(row.tolist())))


def evaluate_model_jax(params, train_loader, val_loader, eval_iter):
    """Return the mean losses of training and validation batches."""
    return [calc_loss_loader_jax(loader, params, eval_iter) for loader in (train_loader, val_loader)]


def train_model_simple_jax(
    params, train_loader, val_loader, optimizer, num_epochs, eval_freq, eval_iter, start_context, tokenizer
):
    """Return the parameters, and the losses and tokens at each evaluation."""

    @jax.jit
    def train_step(params, opt_state, input_batch, target_batch):
        gradients = jax.grad(calc_loss_batch_jax)(params, input_batch, target_batch)
        updates, opt_state = optimizer.update(gradients, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    opt_state = optimizer.init(params)
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, 0
    for epoch in range(num_epochs):
        for input_batch, target_batch in train_loader:
            params, opt_state = train_step(params, opt_state, input_batch, target_batch)
            tokens_seen += input_batch.size
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model_jax(params, train_loader, val_loader, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Epoch {epoch + 1}, step {global_step:04d}: {train_loss:.3f} {val_loss:.3f}")
            global_step += 1
        generate_and_print_sample_jax(params, tokenizer, start_context)
    return params, (train_losses, val_losses, track_tokens_seen)


# %% [markdown]
"""
Are these the package's functions? With the random weights of above, the greedy tokens must be the same. From the same
initial weights, ten steps in two short epochs must give the same losses. They are compared within 1e-3, a tolerance
that we chose: training is chaotic, and each step turns tiny differences of rounding into larger ones. (The package's
tests train in float64, with clipping and a schedule, and compare 100 steps much more closely.) The evaluation is
compared with a large dropout, which must have no effect on it.
"""

# %%
SHORT = {"num_epochs": 2, "eval_freq": 1, "eval_iter": 2, "start_context": SETTINGS["start_context"]}
greedy, short = {}, {}  # by the name of the implementation


def loaders(create=create_dataloader_v1, size=None, **options):
    """Return the batches for training and for validation, of the first `size` characters of each text or of all."""
    options |= {"batch_size": 32, "max_length": config.n_ctx, "stride": config.n_ctx}
    return create(text[:split][:size], seed=1, **options), create(text[split:][:size], shuffle=False, **options)


def short_loaders(package=None):
    """Return five batches for training and five for validation, as the package makes them or as we do."""
    options = {"create": package.notebook.create_dataloader_v1, "tokenizer": tokenizer} if package else {}
    return loaders(size=5200, **options)


def agree(name, other):
    """Raise AssertionError unless two short trainings are the same."""
    (*losses, tokens), (*other_losses, other_tokens) = short[name], short[other]
    difference = np.abs(np.array(losses) - np.array(other_losses)).max()
    print(f"{name} and {other}: largest difference of a loss {difference:.1e}")
    assert tokens == other_tokens
    assert difference < 1e-3


# %% tags=["torch"]
idx = torch.tensor(inputs[:, :10])
greedy["torch"] = generate_text_simple(model, idx, 40, config.n_ctx)
assert torch.equal(greedy["torch"], gpt_torch.generate_text_simple(theirs_torch, idx, 40, config.n_ctx))

dropping = GPTModel(GPT_CONFIG | {"drop_rate": 0.5})
load_weights_into_gpt(dropping, params)
evaluated = evaluate_model(dropping, *short_loaders(), eval_iter=2)
theirs = gpt_torch.notebook.evaluate_model(theirs_torch, *short_loaders(gpt_torch), eval_iter=2)
check("evaluation", np.array(evaluated), np.array(theirs), bound=2 * bounds["logits"])

load_weights_into_gpt(model, initial)
their_model = gpt_torch.GPTModel(config, seed=None)
gpt_torch.load_weights_into_gpt(their_model, initial)
with contextlib.redirect_stdout(io.StringIO()):
    short["torch"] = train_model_simple(model, *short_loaders(), adamw(model), tokenizer=tokenizer, **SHORT)
    short["torch, package"] = gpt_torch.notebook.train_model_simple(
        their_model, *short_loaders(gpt_torch), adamw(their_model), None, tokenizer=tokenizer, **SHORT
    )
print("training losses:", *(f"{loss:.5f}" for loss in short["torch"][0]))
agree("torch", "torch, package")

# %% tags=["jax"]
idx = inputs[:, :10]
greedy["jax"] = generate_text_simple_jax(params_jax, idx, 40, config.n_ctx)
theirs = gpt_jax.generate_text_simple(theirs_jax, jnp.asarray(idx, jnp.int32), 40, config.n_ctx)
assert np.array_equal(greedy["jax"], theirs)
assert np.array_equal(greedy["jax"], greedy["torch"])

evaluated = evaluate_model_jax(params_jax, *short_loaders(), eval_iter=2)
theirs = gpt_jax.notebook.evaluate_model(theirs_jax, *short_loaders(gpt_jax), eval_iter=2)
check("evaluation", np.array(evaluated), np.array(theirs), bound=2 * bounds["logits"])

their_model = gpt_jax.GPTModel(config, seed=None)
gpt_jax.load_weights_into_gpt(their_model, initial)
with contextlib.redirect_stdout(io.StringIO()):
    _, short["jax"] = train_model_simple_jax(initial_jax, *short_loaders(), adamw_jax, tokenizer=tokenizer, **SHORT)
    short["jax, package"] = gpt_jax.notebook.train_model_simple(
        their_model, *short_loaders(gpt_jax), adamw_jax, None, tokenizer=tokenizer, **SHORT
    )
print("training losses:", *(f"{loss:.5f}" for loss in short["jax"][0]))
agree("jax", "jax, package")
agree("jax", "torch")

# %% [markdown]
"""
Now the real training: one epoch of the whole text.
"""

# %% tags=["torch", "trained"]
load_weights_into_gpt(model, initial)
optimizer = adamw(model)
untrained_loss = calc_loss_loader(loaders()[1], model)
print("before training:")
generate_and_print_sample(model, tokenizer, SETTINGS["start_context"])
history = train_model_simple(model, *loaders(), optimizer, tokenizer=tokenizer, **SETTINGS)

# %% tags=["jax", "trained"]
print("before training:")
generate_and_print_sample_jax(initial_jax, tokenizer, SETTINGS["start_context"])
trained_jax, history_jax = train_model_simple_jax(initial_jax, *loaders(), adamw_jax, tokenizer=tokenizer, **SETTINGS)

# %% tags=["trained"]
model.eval()  # from here on, no dropout
final_loss = calc_loss_loader(loaders()[1], model)
final_loss_jax = calc_loss_loader_jax(loaders()[1], trained_jax)
print(f"validation loss: {final_loss:.3f} in torch, {final_loss_jax:.3f} in jax; bigram: {bigram:.3f}")
print(f"perplexity per byte: {math.exp(untrained_loss):.1f} before training, {math.exp(final_loss):.2f} after it")
assert max(final_loss, final_loss_jax) < bigram - 0.1
assert abs(final_loss - final_loss_jax) < 0.15


def plot_losses(histories: dict) -> None:
    fig, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    for (name, (train_losses, val_losses, tokens_seen)), color in zip(histories.items(), ("C0", "C1"), strict=True):
        axes.plot(tokens_seen, train_losses, color, label=f"training, {name}")
        axes.plot(tokens_seen, val_losses, color, linestyle="-.", label=f"validation, {name}")
    axes.axhline(bigram, color="grey", linewidth=1, label="bigram, validation")
    axes.set(xlabel="tokens seen", ylabel="loss (nats per token)")
    axes.legend(fontsize=7)
    fig.savefig(OUTPUT / "loss-plot.pdf")
    plt.show()


plot_losses({"torch": history, "jax": history_jax})

# %% [markdown]
"""
## 8. Decoding: temperature, top-k and the end of the text

Greedy text repeats itself. To sample, the logits are divided by a temperature (below 1: safer, above 1: wilder), all
but the `top_k` largest are dropped, and the softmax gives the probabilities. A token is drawn with one uniform number
u: it is the first whose cumulative probability exceeds u. With the same weights and the same u, both frameworks draw
the same token; `parity.sampling.uniforms` gives the number of each (seed, row, position). `torch.multinomial`, which
the original notebook uses, would draw others than JAX.

`eos_id` ends a row; the text stops when all rows have ended, and the rows that ended earlier are filled with it.
"""


# %% tags=["torch"]
def choose(logits, u, temperature, top_k):
    """logits [B, V], u [B] -> tokens [B]"""
    if temperature == 0.0:
        return logits.argmax(dim=-1)
    scaled = logits / temperature
    if top_k is not None:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]
        scaled = scaled.masked_fill(logits < smallest_kept, -torch.inf)
    cumulative = torch.softmax(scaled, dim=-1).cumsum(dim=-1)
    return (cumulative > torch.as_tensor(u)[:, None] * cumulative[:, -1:]).int().argmax(dim=-1)


def generate(model, idx, max_new_tokens, context_size, temperature=0.0, top_k=None, eos_id=None, seed=0):
    """ids [B, T] -> ids [B, T + new]"""
    B, T = idx.shape
    u = uniforms([seed] * B, range(B), [T] * B, max_new_tokens)  # [B, new]
    ended = torch.zeros(B, dtype=torch.bool)
    for number in range(max_new_tokens):
        with torch.no_grad():
            logits = model(idx[:, -context_size:])[:, -1]  # [B, V]
        token = choose(logits, u[:, number], temperature, top_k)
        if eos_id is not None:
            ended = ended | (token == eos_id)
            if ended.all():
                break
            token = token.where(~ended, eos_id)
        idx = torch.cat([idx, token[:, None]], dim=1)
    return idx


# %% tags=["jax"]
@functools.partial(jax.jit, static_argnames="top_k")
def choose_jax(logits, u, temperature, top_k):
    """logits [B, V], u [B] -> tokens [B]"""
    scaled = logits / temperature
    if top_k is not None:
        smallest_kept = jax.lax.top_k(logits, top_k)[0][:, -1:]
        scaled = jnp.where(logits < smallest_kept, -jnp.inf, scaled)
    cumulative = jax.nn.softmax(scaled, axis=-1).cumsum(axis=-1)
    return (cumulative > u[:, None] * cumulative[:, -1:]).argmax(axis=-1)


def generate_jax(
    params,
    idx,
    max_new_tokens,
    context_size,
    temperature=0.0,
    top_k=None,
    eos_id=None,
    seed=0,
    num_heads=GPT_CONFIG["n_heads"],
):
    """ids [B, T] -> ids [B, T + new]"""
    B, T = idx.shape
    u = uniforms([seed] * B, range(B), [T] * B, max_new_tokens)  # [B, new]
    ended = np.zeros(B, bool)
    for number in range(max_new_tokens):
        window = idx[:, -context_size:]
        length = window.shape[1]
        window = np.pad(window, ((0, 0), (0, context_size - length)))
        logits = next_logits(params, window, length, num_heads)  # [B, V]
        if temperature == 0.0:
            token = np.asarray(logits.argmax(axis=-1))
        else:
            token = np.asarray(choose_jax(logits, u[:, number], temperature, top_k))
        if eos_id is not None:
            ended = ended | (token == eos_id)
            if ended.all():
                break
            token = np.where(ended, eos_id, token)
        idx = np.concatenate([idx, token[:, None]], axis=1)
    return idx


# %% [markdown]
"""
All four (two frameworks, ours and the package's) must return the same tokens for the same weights. The package decodes
with a key/value cache, ours without one. For the comparison, the other three get the weights that PyTorch trained,
through a file: the package reads the original notebook's models and needs their configuration beside the file.
"""

# %%
(OUTPUT / "config.json").write_text(json.dumps(GPT_CONFIG))
torch.save(model.state_dict(), OUTPUT / "model.pth")
theirs_torch, theirs_jax = (package.load_pretrained(OUTPUT / "model.pth") for package in (gpt_torch, gpt_jax))
trained = to_params(gpt_torch.export_weights(theirs_torch))
params_jax = jax.tree.map(jnp.asarray, trained)

prompts = np.array([tokenizer.encode(prompt) for prompt in ("The value of ", "If a class is", "In this case,")])
SPACE = ord(" ")
n_equal = 0
for options in (
    {},
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 5, "seed": 1},
    {"temperature": 1.0, "top_k": 20, "eos_id": SPACE, "seed": 3},
):
    options |= {"max_new_tokens": 60, "context_size": config.n_ctx}
    results = [
        generate(model, torch.tensor(prompts), **options).numpy(),
        generate_jax(params_jax, prompts, **options),
        gpt_torch.generate(theirs_torch, torch.tensor(prompts), **options).numpy(),
        np.asarray(gpt_jax.generate(theirs_jax, jnp.asarray(prompts, jnp.int32), **options)),
    ]
    for result in results[1:]:
        assert np.array_equal(results[0], result)
    n_equal += results[0][:, prompts.shape[1] :].size
    print({name: value for name, value in options.items() if name not in ("max_new_tokens", "context_size")})
    print("   ", repr(tokenizer.decode(results[0][0])))
assert results[0].shape[1] < prompts.shape[1] + 60  # with eos_id, all rows ended early
print(f"{n_equal} new tokens, the same in all four")

# %% [markdown]
"""
## 9. Saving and loading

In PyTorch the state of the model and that of the optimizer go into one file, so that training can go on where it
stopped. `weights_only=True` reads tensors and plain values and executes nothing. JAX's tree is a dictionary of arrays,
which NumPy saves.

The proof is that the next training step is the same to the bit.
"""

# %% tags=["torch", "trained"]
file = OUTPUT / "model_and_optimizer.pth"
torch.save({"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, file)

checkpoint = torch.load(file, weights_only=True)
restored = GPTModel(GPT_CONFIG)
restored.load_state_dict(checkpoint["model_state_dict"])
restored_optimizer = torch.optim.AdamW(restored.parameters())
restored_optimizer.load_state_dict(checkpoint["optimizer_state_dict"])

next_batch = next(iter(loaders()[0]))
for each_model, each_optimizer in ((model, optimizer), (restored, restored_optimizer)):
    each_optimizer.zero_grad()
    calc_loss_batch(*next_batch, each_model).backward()
    each_optimizer.step()
assert all(torch.equal(a, b) for a, b in zip(model.parameters(), restored.parameters(), strict=True))
print("the next training step is the same to the bit")

# %% tags=["jax", "trained"]
np.savez(OUTPUT / "params.npz", **flatten(trained_jax))
with np.load(OUTPUT / "params.npz") as file:
    loaded_jax = nest(config, dict(file))
assert jax.tree.all(jax.tree.map(lambda a, b: np.array_equal(a, b), loaded_jax, trained_jax))
print("params.npz holds the same arrays")

# %% [markdown]
"""
## 10. OpenAI's weights

`download_and_load_gpt2` returns the weights of OpenAI's 124M from the cache, or downloads them (498 MB). If they are
not there, and downloads are forbidden or no server can be reached, this section runs the same code on a small
checkpoint in OpenAI's format, which it writes itself: the model trained above.
"""

# %%
import requests

from parity.storage.download import openai_addresses
from parity.storage.paths import cache_folder, is_offline
from parity.weights import openai
from parity.weights.openai_files import model_files


def why_not(folder: Path) -> str:
    """Return why the files of 124M can be neither read nor downloaded; an empty text if they can."""
    missing = [file.name for file in model_files("124M") if not (folder / file.name).exists()]
    if not missing:
        return ""
    if is_offline():
        return "GPT_PARITY_OFFLINE forbids downloads"
    for address in openai_addresses(f"124M/{missing[0]}"):
        try:
            with requests.get(address, stream=True, timeout=5) as response:  # of one file, and once: seconds
                response.raise_for_status()
                return ""
        except requests.RequestException as error:
            problem = f"{address} cannot be reached: {error}"
    return problem


models_dir = cache_folder() / "models"
reason = why_not(models_dir / "124M")
if not reason:
    settings, params = download_and_load_gpt2("124M", models_dir)
    gpt2_tokenizer = load_tokenizer("gpt2", models_dir / "124M" / "vocab.bpe")
    prompt = "Every effort moves you"
    print("These are OpenAI's weights.")
else:
    folder = OUTPUT / "gpt2" / "small"
    openai.write(folder, config, flatten(trained))
    small_config, tensors = openai.read(folder)
    settings, params = openai.hparams(small_config), nest(small_config, tensors)
    gpt2_tokenizer = tokenizer
    prompt = SETTINGS["start_context"]
    print(f"OpenAI's 124M is not in the cache: {reason}.")
    print("These are the weights of the model trained above, in OpenAI's format:", *sorted(os.listdir(folder)))
print(settings)

gpt2_cfg = {
    "vocab_size": settings["n_vocab"],
    "context_length": settings["n_ctx"],
    "emb_dim": settings["n_embd"],
    "n_heads": settings["n_head"],
    "n_layers": settings["n_layer"],
    "drop_rate": 0.0,
    "qkv_bias": True,
    "tied_head": True,
}
theirs = gpt_torch.GPTModel(gpt2_cfg, seed=None)
gpt_torch.load_weights_into_gpt(theirs, params)
idx = np.array([gpt2_tokenizer.encode(prompt)])
options = {"max_new_tokens": 16, "context_size": 32, "top_k": 50, "temperature": 1.0}
sampled = gpt_torch.generate(theirs, torch.tensor(idx), **options).numpy()
print(repr(gpt2_tokenizer.decode(sampled[0])))

# %% tags=["torch"]
gpt = GPTModel(gpt2_cfg)
load_weights_into_gpt(gpt, params)
assert np.array_equal(generate(gpt, torch.tensor(idx), **options).numpy(), sampled)
perplexity = math.exp(calc_loss_batch(sampled[:, :-1], sampled[:, 1:], gpt).item())
print(f"the same tokens; perplexity of this text: {perplexity:.2f} per token")

# %% tags=["jax"]
gpt2_params = jax.tree.map(jnp.asarray, params)

assert np.array_equal(generate_jax(gpt2_params, idx, **options, num_heads=settings["n_head"]), sampled)
print("the same tokens")

# %% [markdown]
"""
## 11. Looking inside

The package's models name their activations; `run_with_cache` returns them, in either framework. Here are the attention
patterns of the model trained above: row t shows where position t looks. The number above a head is how much it looks
at the token before: the mean of the diagonal below the main one.

The logit lens decodes the residual stream after each layer with the output head, as if the model ended there.
"""

# %% tags=["trained"]
from parity.interpret import logit_lens

tokens = np.array([tokenizer.encode(text[split : split + config.n_ctx])])
followers = np.array([tokenizer.encode(text[split : split + config.n_ctx + 1])])[:, 1:]
logits, seen = gpt_torch.run_with_cache(theirs_torch, torch.tensor(tokens))
_, seen_jax = gpt_jax.run_with_cache(theirs_jax, jnp.asarray(tokens, jnp.int32))
uniform = np.mean([1 / (t + 1) for t in range(1, config.n_ctx)])
previous = np.zeros((config.n_layer, config.n_head))
fig, axes = plt.subplots(config.n_layer, config.n_head, figsize=(6, 3.4), layout="constrained")
for layer in range(config.n_layer):
    pattern = as_numpy(seen[f"blocks.{layer}.attn.pattern"])[0]  # [N, T, S]
    assert np.abs(pattern - as_numpy(seen_jax[f"blocks.{layer}.attn.pattern"])[0]).max() < 1e-4
    previous[layer] = pattern.diagonal(offset=-1, axis1=1, axis2=2).mean(axis=-1)
    for head, ax in enumerate(axes[layer]):
        ax.imshow(pattern[head], cmap="Blues")
        ax.set_title(f"layer {layer}, head {head}: {previous[layer, head]:.2f}", fontsize=8)
        ax.set_axis_off()
plt.show()
print(f"attention to the token before: {previous.max():.2f} in one head; {uniform:.2f} in a uniform pattern")
assert previous.max() > 1.3 * uniform

weights = gpt_torch.export_weights(theirs_torch)
lens_losses = {}
for name, lens_logits in logit_lens(config, weights, seen).items():
    log_probs = lens_logits - np.log(np.exp(lens_logits).sum(axis=-1, keepdims=True))
    lens_losses[name] = -np.take_along_axis(log_probs, followers[..., None], axis=-1).mean()
    print(f"{name:20} loss if the model ended here: {lens_losses[name]:.2f}")
assert lens_losses[f"blocks.{config.n_layer - 1}.resid_post"] < lens_losses["embed"]

# %% [markdown]
"""
## 12. Tuning with LoRA

To teach the trained model another kind of text, not all weights need to change. LoRA leaves a matrix W [in, out] as it
is and trains two thin ones: x (W + A B), with A [in, R] and B [R, out]. B starts as zero, so the model starts as it
was; without the adapter it is the old model again. The new text is the old one in capital letters.

Our adapters are written in the files of the package peft, which both packages read, and their logits are compared with
ours, within 1e-4 of the largest one, a tolerance that we chose.
"""

# %%
from parity.weights import peft_files
from parity.weights.adapters import LoraConfig

RANK = 8
capitals = [DataLoader(GPTDatasetV1(part.upper(), tokenizer, config.n_ctx, config.n_ctx), 32, True, 7)
            for part in (text[:split], text[split:])]  # fmt: skip
lora_batches = list(itertools.islice(capitals[0], 60))
lora_test = list(itertools.islice(capitals[1], 10))
lora_rng = np.random.default_rng(2)
A = [
    {name: lora_rng.normal(size=(width, RANK)).astype(np.float32) / math.sqrt(width) for name, width in widths.items()}
    for widths in [{"c_attn": config.n_embd, "c_fc": config.n_embd}] * config.n_layer
]


def write_adapters(adapters):
    """Write adapters in peft's files, as the package has them with its targets q, k, v and mlp.in.

    adapters: for each layer {"c_attn": {"A": [3, in, R], "B": [3, R, D]}, "c_fc": {"A": [in, R], "B": [R, F]}}
    """
    arrays = {}
    for layer, adapter in enumerate(adapters):
        c_attn, c_fc = (jax.tree.map(as_numpy, adapter[name]) for name in ("c_attn", "c_fc"))
        separate = np.einsum("ij,irk->irjk", np.eye(3, dtype=np.float32), c_attn["B"])  # q, k and v have their own
        prefix = f"base_model.model.transformer.h.{layer}"
        arrays |= {
            f"{prefix}.attn.c_attn.lora_A.weight": c_attn["A"].swapaxes(1, 2).reshape(3 * RANK, -1),
            f"{prefix}.attn.c_attn.lora_B.weight": separate.reshape(3 * RANK, -1).T,
            f"{prefix}.mlp.c_fc.lora_A.weight": c_fc["A"].T,
            f"{prefix}.mlp.c_fc.lora_B.weight": c_fc["B"].T,
        }
    lora = LoraConfig(rank=RANK, alpha=RANK, targets=("q", "k", "v", "mlp.in"))  # alpha / rank is a factor of A B
    peft_files.write(OUTPUT / "adapter", config, peft_files.Adapter(lora, arrays))


# %% tags=["torch"]
class LinearWithLoRA(nn.Module):
    def __init__(self, linear, A):
        super().__init__()
        self.linear = linear
        self.A = nn.Parameter(torch.tensor(A))  # [in, R]
        self.B = nn.Parameter(torch.zeros(A.shape[1], linear.out_features))  # [R, out]

    def forward(self, x):
        return self.linear(x) + x @ self.A @ self.B


QKV = ("W_query", "W_key", "W_value")
base, tuned = GPTModel(GPT_CONFIG), GPTModel(GPT_CONFIG)
load_weights_into_gpt(base, trained)
load_weights_into_gpt(tuned, trained)
tuned.requires_grad_(False)
for block, matrices in zip(tuned.trf_blocks, A, strict=True):
    for name in QKV:
        setattr(block.att, name, LinearWithLoRA(getattr(block.att, name), matrices["c_attn"]))
    block.ff.layers[0] = LinearWithLoRA(block.ff.layers[0], matrices["c_fc"])
tokens = torch.tensor(lora_test[0][0])
assert torch.equal(tuned(tokens), base(tokens)), "the model starts as it was, to the bit"

adapters = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
before = calc_loss_loader(lora_test, tuned)
lora_optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
for batch in lora_batches:
    lora_optimizer.zero_grad()
    calc_loss_batch(*batch, tuned).backward()
    lora_optimizer.step()
after = calc_loss_loader(lora_test, tuned)
n_adapter, n_all = (sum(p.numel() for p in parameters) for parameters in (adapters, model.parameters()))
print(f"{n_adapter:,} trained parameters beside {n_all:,}; loss on capitals: {before:.2f} -> {after:.2f}")
assert after < before - 0.5

trained_adapters = [
    {
        "c_attn": {matrix: torch.stack([getattr(getattr(block.att, name), matrix) for name in QKV]) for matrix in "AB"},
        "c_fc": {matrix: getattr(block.ff.layers[0], matrix) for matrix in "AB"},
    }
    for block in tuned.trf_blocks
]
write_adapters(trained_adapters)
gpt_torch.load_adapter(theirs_torch, OUTPUT / "adapter")
with torch.no_grad():
    theirs = theirs_torch(tokens)
    check("logits with adapters", tuned(tokens), theirs, bound=1e-4 * theirs.abs().max().item())

for block in tuned.trf_blocks:  # without the adapters
    for name in QKV:
        setattr(block.att, name, getattr(block.att, name).linear)
    block.ff.layers[0] = block.ff.layers[0].linear
weights, base_weights = tuned.state_dict(), base.state_dict()
assert weights.keys() == base_weights.keys()
assert all(torch.equal(weights[name], base_weights[name]) for name in weights), "the old model again, to the bit"


# %% tags=["jax"]
def with_adapters(params, adapters):
    """Return the parameters with A B added to the matrices."""
    blocks = []
    for block, adapter in zip(params["blocks"], adapters, strict=True):
        c_attn, c_fc = block["attn"]["c_attn"], block["mlp"]["c_fc"]
        change = adapter["c_attn"]["A"] @ adapter["c_attn"]["B"]  # [3, in, D]
        attn = block["attn"] | {"c_attn": c_attn | {"w": c_attn["w"] + jnp.concatenate(list(change), axis=-1)}}
        change = adapter["c_fc"]["A"] @ adapter["c_fc"]["B"]
        mlp = block["mlp"] | {"c_fc": c_fc | {"w": c_fc["w"] + change}}
        blocks.append(block | {"attn": attn, "mlp": mlp})
    return params | {"blocks": blocks}


@jax.jit
def lora_loss(adapters, params, inputs, targets):
    return calc_loss_batch_jax(with_adapters(params, adapters), inputs, targets)


# In PyTorch, queries, keys and values have an A of their own each, which starts from the same numbers.
adapters_jax = [
    {
        "c_attn": {"A": jnp.stack([matrices["c_attn"]] * 3), "B": jnp.zeros((3, RANK, config.n_embd))},
        "c_fc": {"A": jnp.asarray(matrices["c_fc"]), "B": jnp.zeros((RANK, 4 * config.n_embd))},
    }
    for matrices in A
]
tokens = lora_test[0][0]
fresh = gpt_model(with_adapters(params_jax, adapters_jax), tokens)
assert np.array_equal(fresh, gpt_model(params_jax, tokens)), "the model starts as it was, to the bit"

lora_optimizer_jax = optax.adamw(1e-2, weight_decay=0.0)
opt_state = lora_optimizer_jax.init(adapters_jax)
before_jax = np.mean([lora_loss(adapters_jax, params_jax, *batch) for batch in lora_test])
for batch in lora_batches:
    gradients = jax.grad(lora_loss)(adapters_jax, params_jax, *batch)  # of the adapters alone
    updates, opt_state = lora_optimizer_jax.update(gradients, opt_state, adapters_jax)
    adapters_jax = optax.apply_updates(adapters_jax, updates)
after_jax = np.mean([lora_loss(adapters_jax, params_jax, *batch) for batch in lora_test])
print(f"loss on capitals: {before_jax:.2f} -> {after_jax:.2f}")
assert abs(before - before_jax) < 1e-4
assert abs(after - after_jax) < 0.1
write_adapters(adapters_jax)
gpt_jax.load_adapter(theirs_jax, OUTPUT / "adapter")
theirs = theirs_jax(jnp.asarray(tokens, jnp.int32))
ours = gpt_model(with_adapters(params_jax, adapters_jax), tokens)
check("logits with adapters", ours, theirs, bound=1e-4 * float(jnp.abs(theirs).max()))

# %% [markdown]
"""
## What came out
"""

# %% tags=["trained"]
files = sorted(path.relative_to(OUTPUT).as_posix() for path in OUTPUT.rglob("*") if path.is_file())
assert {"config.json", "loss-plot.pdf", "model.pth", "model_and_optimizer.pth", "params.npz"} < set(files)
print(f"files in the folder {OUTPUT}:", *files)
print(
    f"validation loss {final_loss:.3f} in torch and {final_loss_jax:.3f} in jax, below the bigram model's {bigram:.3f}"
)
print(f"{n_equal} sampled tokens, the same in both frameworks and in the package")
print(f"{time.perf_counter() - START:.0f} seconds")
