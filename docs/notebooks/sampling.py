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
# Sampling compared

A model gives a probability to each token; a sampling rule chooses one. Here we train a small model on text, look at
what each rule keeps of one distribution, check the tokens that it draws against the probabilities, and compare the
texts by numbers. The whole notebook takes about a minute on two CPU cores.

What should come out:

- each rule keeps the tokens that its definition, written out in NumPy, keeps, and no other token is ever drawn;
- 4,000 drawn tokens have the frequencies of the probabilities;
- PyTorch and JAX draw the same tokens from the same weights;
- the text of a prompt does not depend on what else is in the batch;
- the higher the temperature, the less probable is the text; greedy text repeats itself, and a repetition penalty makes
  it do so less. With bytes as tokens such a penalty is a blunt tool: it makes letters improbable that any text needs.
"""

# %%
import math

import matplotlib.pyplot as plt
import numpy as np
import torch

import gpt_jax
import gpt_torch
from gpt_torch.train import Trainer
from parity import GPTConfig, load_tokenizer
from parity.data.corpora import EMBEDDED, load_corpus
from parity.data.windows import Windows
from parity.training.bigram import bigram_loss
from parity.training.loop import evaluate
from parity.training.schedule import learning_rate
from parity.training.settings import TrainSettings

# %% [markdown]
"""
## A small model

The text is Python's own documentation, which every Python installation contains, and the tokens are bytes. A few
hundred steps are enough to learn words, not sentences.
"""

# %%
tokenizer = load_tokenizer("bytes")
corpus = load_corpus(EMBEDDED, tokenizer)
config = GPTConfig(n_vocab=tokenizer.n_vocab, n_ctx=96, n_embd=96, n_head=4, n_layer=2)
settings = TrainSettings(dtype="float32", batch_size=16, accumulate=1, steps=400, warmup=40, lr=4e-3, min_lr=4e-4)
train = Windows(corpus.train, config.n_ctx, config.n_vocab)
validation = Windows([corpus.validation[0][:20_000]], config.n_ctx, config.n_vocab)

trainer = Trainer(config, settings, attention="sdpa")
untrained = evaluate(trainer, validation, 16)
for step in range(settings.steps):
    inputs, targets = train.batch(settings.seed, step, settings.batch_size)
    lr = learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps)
    trainer.train_step(trainer.to_device(inputs[None], targets[None]), lr, step)
trained = evaluate(trainer, validation, 16)
print(f"validation loss: {untrained:.3f} nats per byte before training, {trained:.3f} after")
bigram = bigram_loss(corpus.train, validation.shards, config.n_vocab)
print(f"guessing: {math.log(config.n_vocab):.3f}; the best bigram model: {bigram:.3f}")
assert abs(untrained - math.log(config.n_vocab)) < 0.3, "an untrained model guesses"
assert trained < bigram, "the trained model uses more than the last byte"

# The same weights in both frameworks.
models = {gpt_torch: trainer.model, gpt_jax: gpt_jax.GPTModel(config, seed=None)}
gpt_jax.load_weights(models[gpt_jax], gpt_torch.export_weights(trainer.model))


def generate(prompts, max_new_tokens, **options):
    """Return the rows of both frameworks, after checking that they are equal."""
    rows, again = (package.generate(model, prompts, max_new_tokens, **options) for package, model in models.items())
    assert rows == again, "PyTorch and JAX draw the same tokens"
    return rows


# %% [markdown]
"""
## What each rule keeps

The model's distribution of the next token after one prompt, and the rules in the order in which they apply
(`parity/sampling.py` has the definitions): top-k keeps the k most probable tokens; the temperature divides the logits;
top-p keeps the fewest most probable tokens that together reach p; min-p keeps tokens at least p times as probable as
the most probable one.
"""

# %%
PROMPT = tokenizer.encode("The return val")
with torch.no_grad():
    logits = models[gpt_torch](torch.tensor([PROMPT]))[0, -1].double().numpy()  # [V]


def softmax(x):
    x = np.exp(x - x.max())
    return x / x.sum()


def probabilities(logits, temperature=1.0, top_k=None, top_p=1.0, min_p=0.0):
    """Return the probabilities from which a rule draws, float64 [V], zero for the tokens that it drops."""
    kept = np.ones(len(logits), bool) if top_k is None else logits >= np.sort(logits)[-top_k]
    probs = softmax(np.where(kept, logits / temperature, -np.inf))
    order = np.argsort(-probs, kind="stable")
    before = np.cumsum(probs[order]) - probs[order]
    smallest = probs[order[before < top_p][-1]]
    probs = np.where((probs >= smallest) & (probs >= min_p * probs.max()), probs, 0)
    return probs / probs.sum()


RULES = {
    "everything": {},
    "temperature 0.5": {"temperature": 0.5},
    "temperature 1.5": {"temperature": 1.5},
    "top-k 5": {"top_k": 5},
    "top-p 0.8": {"top_p": 0.8},
    "min-p 0.1": {"min_p": 0.1},
    "temperature 1.5, min-p 0.1": {"temperature": 1.5, "min_p": 0.1},
    "top-k 20, top-p 0.9, temperature 0.8": {"top_k": 20, "top_p": 0.9, "temperature": 0.8},
}
DRAWS = 4000
print(f"{'rule':<38} {'kept':>4} {'entropy':>8} {'distance':>9} {'bound':>6}")
drawn = {}
for rule, options in RULES.items():
    probs = probabilities(logits, **options)
    rows = gpt_torch.generate(models[gpt_torch], [PROMPT], 1, samples=DRAWS, seed=1, **options)
    counts = np.bincount([row[-1] for row in rows], minlength=config.n_vocab)
    drawn[rule] = counts / DRAWS
    kept = probs > 0
    entropy = -np.sum(probs[kept] * np.log(probs[kept]))
    # Half the sum of the absolute errors. Its mean is at most the first term, and it exceeds the sum of both once in a
    # million cases (McDiarmid's inequality).
    distance = np.abs(drawn[rule] - probs).sum() / 2
    bound = np.sqrt(probs * (1 - probs) / DRAWS).sum() / 2 + math.sqrt(math.log(1e6) / (2 * DRAWS))
    print(f"{rule:<38} {kept.sum():4d} {entropy:8.3f} {distance:9.4f} {bound:6.4f}")
    assert not counts[~kept].any(), "no dropped token is drawn"
    assert distance < bound, "the tokens have the frequencies of the probabilities"

# %%
figure, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
most_probable = np.argsort(-softmax(logits))[:16]
for number, rule in enumerate(("everything", "temperature 0.5", "temperature 1.5", "top-p 0.8")):
    places = np.arange(len(most_probable)) + 0.2 * number - 0.3
    axes.bar(places, probabilities(logits, **RULES[rule])[most_probable], 0.2, label=rule)
    axes.plot(places, drawn[rule][most_probable], "k_", markersize=5)
axes.set_xticks(range(len(most_probable)), [repr(tokenizer.decode([token])) for token in most_probable], fontsize=8)
axes.set(xlabel="next byte (black marks: drawn frequency)", ylabel="probability")
axes.legend()
plt.show()

# %% [markdown]
"""
## The texts

The same prompt and seed under each rule. `generate` above asserts that PyTorch and JAX draw the same tokens; each
token has its own random number, which depends only on the seed, the row and the position.
"""

# %%
TEXTS = {
    "greedy": {"temperature": 0.0},
    "greedy, repetition penalty 1.3": {"temperature": 0.0, "repetition_penalty": 1.3},
    **{rule: RULES[rule] for rule in ("temperature 0.5", "everything", "temperature 1.5", "top-p 0.8", "min-p 0.1")},
}
START = tokenizer.encode("The ")
for rule, options in TEXTS.items():
    [row] = generate([START], 80, seed=0, **options)
    print(f"{rule:<32} {tokenizer.decode(row)!r}")

# %% [markdown]
"""
A prompt with its own row number gets the same text alone and in a batch of any other prompts.
"""

# %%
[alone] = generate([START], 40, seed=3, temperature=0.8, per_prompt=[{"row": 7}])
batch = generate(
    [tokenizer.encode("A list is a "), START, PROMPT],
    40,
    seed=3,
    temperature=0.8,
    per_prompt=[{"row": 1}, {"row": 7}, {"row": 2}],
)
assert batch[1] == alone
print(repr(tokenizer.decode(alone)))

# %% [markdown]
"""
## The texts in numbers

Over 16 prompts: the mean log-probability that the model gives to the tokens that were chosen, and the fraction of
sequences of four tokens that had occurred before in the same text.
"""

# %%
starts = [tokenizer.encode(text) for text in ("The ", "If ", "A ", "For ", "This ", "An ", "In ", "When ")] * 2


def measure(**options):
    """Return (mean log-probability in nats, fraction of repeated sequences of four tokens)."""
    rows, logprobs = gpt_torch.generate(models[gpt_torch], starts, 80, seed=5, return_logprobs=True, **options)
    repeated = []
    for row in rows:
        grams = list(zip(*(row[i:] for i in range(4)), strict=False))
        repeated.append(1 - len(set(grams)) / len(grams))
    return np.mean([value for row in logprobs for value in row]), np.mean(repeated)


measured = {rule: measure(**options) for rule, options in TEXTS.items()}
for rule, (logprob, repeated) in measured.items():
    print(f"{rule:<32} {logprob:6.2f} nats per token, {repeated:4.0%} repeated")

by_temperature = [measured[rule][0] for rule in ("greedy", "temperature 0.5", "everything", "temperature 1.5")]
assert by_temperature == sorted(by_temperature, reverse=True), "a higher temperature chooses less probable tokens"
assert measured["greedy"][1] > 2 * measured["everything"][1], "greedy text repeats itself"
assert measured["greedy, repetition penalty 1.3"][1] < measured["greedy"][1], "a penalty on repetition reduces it"

# %% [markdown]
"""
`scripts/compare_decoding.py` makes such a table, a picture and a report of any model and prompts, and
[Generating text](../guides/generate.md) explains all options.
"""
