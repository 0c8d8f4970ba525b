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
# Attention heads and induction

A model with two layers learns to continue a text that repeats itself. We watch the loss fall, find the attention heads
that do the work by their scores, and remove them. The whole notebook takes about a minute on two CPU cores.

A head that continues "A B ... A" with "B" is called an induction head (Elhage et al. 2021; Olsson et al. 2022). It
needs two layers: a head of the first layer writes into each position which token came *before* it, and a head of
the second layer looks for the position that has the present token as its predecessor, and copies what is there.

What should come out:

- the loss of the repeated part falls from ln 32 = 3.47 nats per token to less than 0.2, more than half of it within
  200 of the 1000 steps;
- at that time the first head of the second layer becomes an induction head; in the end there are several, and a head of
  the first layer attends to the previous token;
- without the induction heads the loss is high again; without the other heads of their layer it is not;
- without the head that attends to the previous token, the induction heads no longer find their place;
- PyTorch computes the same scores and losses from the same weights.
"""

# %%
import math

import jax

jax.config.update("jax_enable_x64", True)

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import torch

import gpt_jax
import gpt_torch
from gpt_jax.train import Trainer
from parity import GPTConfig
from parity.config import IGNORE_INDEX
from parity.interpret import direct_logit_attribution, induction_scores
from parity.training.settings import TrainSettings

# %% [markdown]
"""
## The task

Each row is a random list of different tokens, repeated until the row is full. The length of the list differs from
row to row, so the model cannot learn a fixed distance: it has to look for the previous occurrence of a token. The
first pass through the list cannot be predicted, and its targets do not count in the loss. (Of the positions before any
repetition only the last one counts. Nothing there says that the list ends, but its target is always the first token.)
"""

# %%
config = GPTConfig(n_vocab=32, n_ctx=32, n_embd=32, n_head=4, n_layer=2)


def repeated_rows(generator, n_rows, period=None):
    """Return inputs and targets, int32 [B, T]; the period is drawn for each row, unless it is given."""
    rows = np.empty((n_rows, config.n_ctx + 1), np.int32)
    targets = np.empty((n_rows, config.n_ctx), np.int32)
    for row, target in zip(rows, targets, strict=True):
        length = period or generator.integers(5, 13)
        row[:] = np.resize(generator.permutation(config.n_vocab)[:length], len(row))
        target[:] = row[1:]
        target[: length - 1] = IGNORE_INDEX
    return rows[:, :-1], targets


inputs, targets = repeated_rows(np.random.default_rng(1), 1, period=8)
print("inputs ", *inputs[0, :20])
print("targets", *targets[0, :20])

# %% [markdown]
"""
## Training

`Trainer` is the one that `scripts/train_jax.py` uses; that of `gpt_torch` has the same arguments and takes the same
steps. Every 25 steps we note the loss on rows that were never trained on, and how much each head attends to

- the token after the previous occurrence of its own token (`induction_scores`), and
- the token before its own.

Which of several heads learns what is a matter of chance, and in the end of rounding. In float64 the steps are nearly
the same on every machine.
"""

# %%
settings = TrainSettings(dtype="float64", batch_size=32, accumulate=1, weight_decay=1e-4, beta2=0.99)
trainer = Trainer(config, settings)
generator = np.random.default_rng(0)
test_inputs, test_targets = repeated_rows(np.random.default_rng(1), 32)
PERIOD = 12
probe = repeated_rows(np.random.default_rng(2), 16, PERIOD)[0][:, : 2 * PERIOD]  # each list exactly twice
PATTERNS = ["blocks.*.attn.pattern"]


def cross_entropy(logits):
    """Return the mean loss of logits [B, T, V] on the test rows, in nats per token of the repeated part."""
    logprobs = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    counted = test_targets != IGNORE_INDEX
    return -logprobs[counted, test_targets[counted]].mean()


def loss_of(patches):
    """Return the loss of the model with some activations replaced."""
    return cross_entropy(np.asarray(gpt_jax.run_with_patches(trainer.model, jnp.asarray(test_inputs), patches)))


def scores_of(patches):
    """Return the induction scores and the previous-token scores of all heads, both [L, N]."""
    _, cache = gpt_jax.run_with_cache(trainer.model, jnp.asarray(probe), PATTERNS, patches)
    positions = np.arange(1, probe.shape[1])
    patterns = [np.asarray(pattern) for pattern in cache.values()]  # each [B, N, T, S]
    previous = np.stack([pattern[:, :, positions, positions - 1].mean(axis=(0, 2)) for pattern in patterns])
    return induction_scores(config, cache, PERIOD), previous


STEPS, LR = 1000, 4e-3
history = []
for step in range(STEPS + 1):
    if step > 0:
        batch = [rows[None] for rows in repeated_rows(generator, settings.batch_size)]  # [A, B, T], one micro-batch
        trainer.train_step(trainer.to_device(*batch), LR * min(1, step / 50), step)
    if step % 25 == 0:
        history.append((step, loss_of({}), *scores_of({})))
        if step % 100 == 0:
            print(f"step {step:4d}: loss {history[-1][1]:.3f}, largest induction score {history[-1][2].max():.2f}")

steps, losses, induction, previous = map(np.array, zip(*history, strict=True))
chance = math.log(config.n_vocab)
assert abs(losses[0] - chance) < 0.2, "an untrained model guesses"
assert losses[-1] < 0.2, "the model has learned to continue the list"
falls = losses[:-8] - losses[8:]  # within 200 steps
print(f"steps {steps[falls.argmax()]} to {steps[falls.argmax() + 8]}: the loss falls by {falls.max():.2f}")
assert falls.max() > 0.5 * (losses[0] - losses[-1]), "more than half of the fall is within 200 steps"

# %% [markdown]
"""
## Which heads are they?

The scores of the trained model, and how they came about:
"""

# %%
print("induction scores, by layer:     ", induction[-1].round(2).tolist())
print("previous-token scores, by layer:", previous[-1].round(2).tolist())
heads = [head for head in range(config.n_head) if induction[-1][1, head] > 0.3]
others = [head for head in range(config.n_head) if head not in heads]
first = int(previous[-1][0].argmax())
print(f"induction heads: {heads} of layer 1; previous-token head: {first} of layer 0")
assert len(heads) > 1, "there are induction heads"
appears = steps[(induction[:, 1].max(axis=-1) > 0.3).argmax()]
print(f"the first induction head appears at step {appears}")
assert steps[falls.argmax()] <= appears <= steps[falls.argmax() + 8], "it appears while the loss falls"
assert others, "not every head is one"
assert induction[-1][0].max() < 0.3, "none is in the first layer: an induction head needs a layer before it"
assert induction[-1][1, others].max() < 0.2, "the others of the layer do something else"
assert induction[-1][1, heads].max() > 0.6
assert previous[-1][0, first] > 0.3

figure, (above, below) = plt.subplots(2, 1, figsize=(7, 5), sharex=True, layout="constrained")
above.plot(steps, losses, color="black")
above.axhline(chance, linestyle="--", color="gray", label="guessing")
above.set(ylabel="loss (nats per token)")
above.legend()
for head in range(config.n_head):
    below.plot(steps, induction[:, 1, head], color="tab:red", alpha=1 if head in heads else 0.3)
    below.plot(steps, previous[:, 0, head], color="tab:blue", alpha=1 if head == first else 0.3)
below.plot([], color="tab:red", label="induction score, layer 1")
below.plot([], color="tab:blue", label="previous-token score, layer 0")
below.set(xlabel="step", ylabel="mean attention")
below.legend()
plt.show()

# %% [markdown]
"""
The patterns of both kinds of heads for one list of 12 tokens, twice: the previous-token head attends to the diagonal
below its own position; the induction head begins to attend eleven positions back in the second pass.
"""

# %%
strongest = int(induction[-1][1].argmax())
_, cache = gpt_jax.run_with_cache(trainer.model, jnp.asarray(probe[:1]))
figure, panels = plt.subplots(1, 2, figsize=(7, 3.6), layout="constrained")
for axes, (layer, head) in zip(panels, ((0, first), (1, strongest)), strict=True):
    axes.imshow(cache[f"blocks.{layer}.attn.pattern"][0, head], vmin=0, vmax=1)
    axes.set(title=f"layer {layer}, head {head}", xlabel="key", ylabel="query")
plt.show()

# %% [markdown]
"""
## Ablation

A score is a correlation. To see that the heads are the cause, we remove the output of some of them: a patch of
`attn.z`, the values averaged by the pattern, [B, T, N, H].
"""


# %%
def without(layer, heads):
    """Return the patch that removes heads of a layer."""
    keep = np.ones((config.n_head, 1))
    keep[heads] = 0
    return {f"blocks.{layer}.attn.z": lambda z: z * keep}


intact = loss_of({})
without_induction, without_others = loss_of(without(1, heads)), loss_of(without(1, others))
print(f"all heads:                        {intact:.3f} nats per token")
print(f"without the induction heads:      {without_induction:.3f}")
print(f"without the others of that layer: {without_others:.3f}")
assert without_induction > intact + 2, "without the induction heads the model fails"
assert without_others < intact + 0.5, "without the others it is nearly as good"

# %% [markdown]
"""
The two layers work together. Without the previous-token head of the first layer the induction heads are still there,
but do not know where to look:
"""

# %%
broken = scores_of(without(0, [first]))[0][1, strongest]
print(f"score of the strongest induction head: {induction[-1][1, strongest]:.2f}; without its partner: {broken:.2f}")
assert broken < 0.5 * induction[-1][1, strongest]

# %% [markdown]
"""
## What the heads write

The logit of a token is a sum over the components of the model. We split the difference between the logits of the right
token and of the present one; most of it comes from the attention of the second layer.
"""

# %%
weights = gpt_jax.export_weights(trainer.model)
position = PERIOD + 5
answer, present = int(probe[0, position + 1]), int(probe[0, position])
parts = direct_logit_attribution(config, weights, cache, token=answer, minus=present)
for name, part in parts.items():
    print(f"{name:<20} {part[0, position]:+.2f}")
total = sum(part[0, position] for part in parts.values())
logits = np.asarray(cache["logits"])[0, position]
assert abs(total - (logits[answer] - logits[present])) < 1e-9, "the parts add up to the difference of the logits"
assert max(parts, key=lambda name: parts[name][0, position]) == "blocks.1.attn.out"

# %% [markdown]
"""
## The same in PyTorch

The weights of the trained model give the same scores, and the same loss without the induction heads.
"""

# %%
in_torch = gpt_torch.cast(gpt_torch.GPTModel(config, seed=None), "float64")
gpt_torch.load_weights(in_torch, weights)
keep = torch.ones(config.n_head, 1, dtype=torch.float64)
keep[heads] = 0
with torch.no_grad():
    _, patterns = gpt_torch.run_with_cache(in_torch, torch.from_numpy(probe), PATTERNS)
    ablated = {"blocks.1.attn.z": lambda z: z * keep}
    logits = gpt_torch.run_with_patches(in_torch, torch.from_numpy(test_inputs), ablated)
largest = np.abs(induction_scores(config, patterns, PERIOD) - induction[-1]).max()
print(f"largest difference of a score: {largest:.1e}")
print(f"loss without the induction heads: {cross_entropy(logits.numpy()):.9f}, in JAX {without_induction:.9f}")
assert largest < 1e-9
assert abs(cross_entropy(logits.numpy()) - without_induction) < 1e-9
