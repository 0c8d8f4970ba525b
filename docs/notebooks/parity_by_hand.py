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
# Parity by hand

How do you know that two programs compute the same function? Here we write GPT-2 a third time, in thirty lines of
NumPy, compare it with both models, see how large the differences may be, and then plant errors in it and watch the
report find the place of each. The whole notebook takes about a minute on two CPU cores.

What should come out:

- in float64 the thirty lines equal the reference of the package to 1e-12;
- in float32 no two of the three are equal to the bit, but every activation of each is within the bound that rounding
  allows;
- each planted error is reported at the activation where it was planted, even one that changes no logit by more than
  1e-4;
- gradients, AdamW updates, losses, cached decoding and sampled tokens of PyTorch and JAX pass as well.
"""

# %%
import math
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np

from parity import as_config, reference, taps
from parity.comparison.case import Case, random_tokens, sharp_weights
from parity.comparison.implementation import Implementation, open_implementation
from parity.comparison.protocol import Compute
from parity.comparison.report import by_section, first_failure, verdict
from parity.comparison.sections import compare_implementations
from parity.training.settings import recipe

# %% [markdown]
"""
## GPT-2 in thirty lines

The names of the weights are those of Hugging Face, and the names of the activations are those of both models
(`parity/taps/names.py`). Every function that we will later replace by a wrong one is an argument.
"""


# %%
def gelu(x):
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def layer_norm(x, scale, shift, eps=1e-5):
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(np.square(centered).mean(-1, keepdims=True) + eps) * scale + shift


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def causal_mask(T):
    return np.tril(np.ones((T, T), bool))


def score_scale(config):
    return 1 / math.sqrt(config.head_width)


def forward(config, w, tokens, gelu=gelu, layer_norm=layer_norm, mask=causal_mask, scale=score_scale):
    """Return every named activation of tokens [B, T]; it computes in the dtype of the weights."""
    (B, T), N = tokens.shape, config.n_head
    a = {}
    x = a["embed"] = w["wte.weight"][tokens] + w["wpe.weight"][:T]
    for i in range(config.n_layer):
        layer, block = f"h.{i}", f"blocks.{i}"
        h = a[f"{block}.ln_1"] = layer_norm(x, w[f"{layer}.ln_1.weight"], w[f"{layer}.ln_1.bias"])
        qkv = h @ w[f"{layer}.attn.c_attn.weight"] + w[f"{layer}.attn.c_attn.bias"]
        q, k, v = (part.reshape(B, T, N, -1) for part in np.split(qkv, 3, axis=-1))
        a |= {f"{block}.attn.q": q, f"{block}.attn.k": k, f"{block}.attn.v": v}
        scores = a[f"{block}.attn.scores"] = np.einsum("BTNH,BSNH->BNTS", q, k) * q.dtype.type(scale(config))
        pattern = a[f"{block}.attn.pattern"] = softmax(np.where(mask(T), scores, np.finfo(scores.dtype).min))
        z = a[f"{block}.attn.z"] = np.einsum("BNTS,BSNH->BTNH", pattern, v)
        h = z.reshape(B, T, -1) @ w[f"{layer}.attn.c_proj.weight"] + w[f"{layer}.attn.c_proj.bias"]
        a[f"{block}.attn.out"] = h
        x = a[f"{block}.resid_mid"] = x + h
        h = a[f"{block}.ln_2"] = layer_norm(x, w[f"{layer}.ln_2.weight"], w[f"{layer}.ln_2.bias"])
        h = a[f"{block}.mlp.pre"] = h @ w[f"{layer}.mlp.c_fc.weight"] + w[f"{layer}.mlp.c_fc.bias"]
        h = a[f"{block}.mlp.post"] = gelu(h)
        h = a[f"{block}.mlp.out"] = h @ w[f"{layer}.mlp.c_proj.weight"] + w[f"{layer}.mlp.c_proj.bias"]
        x = a[f"{block}.resid_post"] = x + h
    x = a["ln_f"] = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"])
    a["logits"] = x @ w["wte.weight"].T
    return a


# %% [markdown]
"""
## Equal in float64

The input is a small model and random tokens. The weights are *sharp*: initial weights with matrices five times as
large and random biases. With fresh weights all attention is nearly uniform and all biases are zero, and many errors
would not show.
"""

# %%
config = as_config("tiny")
weights = sharp_weights(config, seed=0)
tokens = random_tokens(config, batch=2, positions=23)
names = taps.activation_names(config)
print(f"{config}\n{len(names)} activations, the last one {names[-1]}")

exact = reference.activations(config, weights, tokens[:, :-1])
float64 = {name: array.astype(np.float64) for name, array in weights.items()}
by_hand = forward(config, float64, tokens[:, :-1])
assert list(by_hand) == names, "every activation has the same name, in the same order"
largest = max(np.abs(by_hand[name] - exact[name]).max() for name in names)
print(f"largest difference of any activation in float64: {largest:.1e}")
assert largest < 1e-12, "the thirty lines compute the function of the reference"

# %% [markdown]
"""
## Not equal in float32

A sum of many numbers depends on its order, and each library has its own. The question is not whether the results
differ, but whether they differ by more than rounding explains. `activation_bounds` answers it: it runs the exact
model with random rounding errors added to every activation, and lets the network propagate them
([Comparing implementations](../guides/parity.md#error-bounds)).
"""

# %%
case = Case(config, weights, tokens, Compute("float32"), names)
settings = recipe("small").settings
torch, jax = (open_implementation(name, config) for name in ("torch", "jax"))


def third(forward):
    """Return an implementation that the report can compare; a Python file with this function would do as well."""

    def activations(config, weights, tokens, names, compute):
        return forward(config, weights, tokens)

    return Implementation("by hand", SimpleNamespace(activations=activations))


def report(a, b, *sections):
    return list(compare_implementations(a, b, case, settings, sections))


print(f"{'':<22} {'|torch-jax|':>11} {'|torch-exact|':>13} {'|jax-exact|':>11} {'bound':>9} {'share':>6}")
rows = report(torch, jax, "activations")
for row in rows:
    if row.name.startswith(("embed", "blocks.2", "ln_f", "logits")):
        errors = f"{row.difference:11.1e} {row.error_a:13.1e} {row.error_b:11.1e} {row.bound:9.1e}"
        print(f"{row.name:<22} {errors} {row.share:6.0%}")
assert first_failure(rows) is None, verdict(rows)
assert any(row.difference > 0 for row in rows), "they are not equal to the bit"
assert any(row.share > 0.01 for row in rows), "the bounds are near to what happens"

print()
for model in (torch, jax):
    correct = report(third(forward), model, "activations")
    print(f"by hand against {model.name}: {verdict(correct)}")
    assert first_failure(correct) is None, verdict(correct)
    assert any(row.difference > 0 for row in correct), "these are not equal either"

# %% [markdown]
"""
## Planted errors

Each of these mistakes has been made in a real port. The shapes are right in all of them, and a model with them
trains. The report names the first activation, in the order of the computation, that is beyond its bound.
"""

# %%
erf = np.vectorize(math.erf)


def exact_gelu(x):
    return (0.5 * x * (1 + erf(x / math.sqrt(2)))).astype(x.dtype)


def small_eps(x, scale, shift):
    return layer_norm(x, scale, shift, eps=1e-6)


def unbiased(x, scale, shift):
    D = x.shape[-1]
    centered = x - x.mean(-1, keepdims=True)
    return centered / np.sqrt(np.square(centered).sum(-1, keepdims=True) / (D - 1) + 1e-5) * scale + shift


def one_ahead(T):
    return np.tril(np.ones((T, T), bool), 1)


def scale_of_model(config):
    return 1 / math.sqrt(config.n_embd)


def with_weights(change):
    """Return a forward pass with altered weights."""
    return lambda config, w, tokens: forward(config, {**w, **change(w)}, tokens)


def with_function(**wrong):
    """Return a forward pass with a wrong function."""
    return lambda config, w, tokens: forward(config, w, tokens, **wrong)


def swapped(w):
    """The order key, query, value in place of query, key, value."""
    q, k, v = np.split(w["h.1.attn.c_attn.weight"], 3, axis=1)
    return {"h.1.attn.c_attn.weight": np.concatenate([k, q, v], axis=1)}


ERRORS = {
    "GELU in its erf form": (with_function(gelu=exact_gelu), "blocks.0.mlp.post"),
    "LayerNorm with eps 1e-6": (with_function(layer_norm=small_eps), "blocks.0.ln_1"),
    "LayerNorm with the unbiased variance": (with_function(layer_norm=unbiased), "blocks.0.ln_1"),
    "a mask that lets the next token through": (with_function(mask=one_ahead), "blocks.0.attn.pattern"),
    "scores divided by the root of D, not of H": (with_function(scale=scale_of_model), "blocks.0.attn.scores"),
    "query and key swapped in layer 1": (with_weights(swapped), "blocks.1.attn.q"),
    "a square matrix transposed in layer 1": (
        with_weights(lambda w: {"h.1.attn.c_proj.weight": w["h.1.attn.c_proj.weight"].T}),
        "blocks.1.attn.out",
    ),
    "a bias forgotten in layer 2": (
        with_weights(lambda w: {"h.2.mlp.c_proj.bias": np.zeros_like(w["h.2.mlp.c_proj.bias"])}),
        "blocks.2.mlp.out",
    ),
}

shares, smallest = {"no error": [row.share for row in correct]}, math.inf
print(f"{'error':<42} {'logits differ by':>16}  first row beyond its bound")
for error, (wrong, expected) in ERRORS.items():
    rows = report(third(wrong), jax, "activations")
    failure = first_failure(rows)
    assert failure is not None, f"{error} was not found"
    print(f"{error:<42} {rows[-1].difference:16.1e}  {failure.name}")
    assert failure.name == expected, f"{error} was reported at {failure.name}"
    assert failure.error_a > failure.bound > failure.error_b, "the reference says that JAX is right and we are wrong"
    shares[error] = [row.share for row in rows]
    smallest = min(smallest, rows[-1].difference)
assert smallest < 1e-4, "an error that nobody would see in the logits"

# %% [markdown]
"""
Two of them in a picture: without an error every activation uses a part of its bound. With the wrong eps, the first
LayerNorm is already beyond its bound; with the forgotten bias, everything before layer 2 is right.
"""

# %%
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name in ("no error", "LayerNorm with eps 1e-6", "a bias forgotten in layer 2"):
    axes.semilogy(np.maximum(shares[name], 1e-3), ".-", label=name)
axes.axhline(1, color="black", linewidth=0.8)
axes.set_xticks(range(0, len(names), 5), names[::5], rotation=60, ha="right", fontsize=7)
axes.set(ylabel="largest error / bound")
axes.legend()
found = np.array(shares["LayerNorm with eps 1e-6"])
assert found[0] <= 1 < found[1], "the embedding is right, the first LayerNorm is not"
plt.show()

# %% [markdown]
"""
## Everything else

The activations are one section of the report. With all of them, for PyTorch and JAX:
"""

# %%
everything = report(torch, jax, "activations", "gradients", "training", "decoding", "samples")
for section, members in by_section(everything).items():
    print(f"{section:<16} {len(members):3d} rows, at most {max(row.share for row in members):.0%} of the bound")
print(verdict(everything))
assert first_failure(everything) is None, verdict(everything)
assert {"gradients", "AdamW updates", "losses", "cached decoding", "sampled tokens"} <= by_section(everything).keys()

# %% [markdown]
"""
`scripts/check_parity.py` prints the same report for any two of `torch`, `jax`, `numpy`, `hf` and your own Python file,
with any weights.
"""
