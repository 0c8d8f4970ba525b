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
# Tuning with LoRA

LoRA (Hu et al. 2021) adapts a model by training two small matrices beside each linear layer, in place of the layer
itself: y = x W + b becomes y = x W + b + scale · x A B. We train a small model on text, adapt it to another kind of
text, and check everything that is said about adapters. The whole notebook takes about a minute on two CPU cores.

What should come out:

- with fresh adapters the model is the same to the bit;
- a tenth of the parameters is trained, the loss on the new text falls by more than half of its distance to the loss on
  the old text, and the base has not changed;
- the change of each matrix has the rank of the adapter;
- the adapter merged into the weights gives the same logits, but for rounding;
- the adapter's folder is small, and JAX reads what PyTorch wrote and draws the same tokens.
"""

# %%
import json
import shutil
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

import gpt_jax
import gpt_torch
from gpt_torch.train import Trainer
from parity import GPTConfig, load_tokenizer
from parity.data.corpora import EMBEDDED, load_corpus
from parity.data.windows import Windows
from parity.training.loop import evaluate
from parity.training.schedule import learning_rate
from parity.training.settings import TrainSettings
from parity.weights import LoraConfig, n_params

folder = Path(tempfile.mkdtemp())

# %% [markdown]
"""
## The base

A model of bytes, trained on Python's documentation. The text that we will adapt it to is the same documentation in
capital letters, which the base has hardly ever seen.
"""

# %%
tokenizer = load_tokenizer("bytes")
corpus = load_corpus(EMBEDDED, tokenizer)
config = GPTConfig(n_vocab=tokenizer.n_vocab, n_ctx=64, n_embd=96, n_head=4, n_layer=2)


def windows(part, upper=False, n_tokens=None):
    """Return the windows of a part of the corpus, in capital letters if asked for."""
    ids = np.asarray(part[0][:n_tokens])
    if upper:
        is_lower = (ids >= ord("a")) & (ids <= ord("z"))
        ids = np.where(is_lower, ids - 32, ids)
    return Windows([ids], config.n_ctx, config.n_vocab)


train, upper_train = windows(corpus.train), windows(corpus.train, upper=True)
validation = windows(corpus.validation, n_tokens=20_000)
upper_validation = windows(corpus.validation, upper=True, n_tokens=20_000)


def run(trainer, dataset):
    """Train for the steps of the trainer's settings; return the loss of each."""
    settings, losses = trainer.settings, []
    for step in range(settings.steps):
        inputs, targets = dataset.batch(settings.seed, step, settings.batch_size)
        lr = learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps)
        losses.append(trainer.train_step(trainer.to_device(inputs[None], targets[None]), lr, step)["loss"].item())
    return losses


settings = TrainSettings(dtype="float32", batch_size=16, accumulate=1, steps=400, warmup=40, lr=4e-3, min_lr=4e-4)
base = Trainer(config, settings, attention="sdpa")
run(base, train)
before = {"lower case": evaluate(base, validation, 16), "capitals": evaluate(base, upper_validation, 16)}
print("base:", ", ".join(f"{loss:.3f} nats per byte on {text}" for text, loss in before.items()))
assert before["lower case"] < 2.6
assert before["capitals"] > before["lower case"] + 1, "the base does not know capital letters"
gpt_torch.save_pretrained(base.model, folder / "base")

# %% [markdown]
"""
## Fresh adapters change nothing

A starts as random numbers and B as zero, so A B is zero.
"""

# %%
lora = LoraConfig(rank=8, alpha=16.0)
ids = torch.from_numpy(upper_validation.batch(0, 0, 4)[0])
model = gpt_torch.load_pretrained(folder / "base")
with torch.no_grad():
    plain = model(ids)
    gpt_torch.add_lora(model, lora)
    assert torch.equal(model(ids), plain), "the same function, to the bit"

n_trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
print(f"{n_trained:,} of {n_params(config):,} parameters are trained: {n_trained / n_params(config):.1%}")
layers = [(config.n_embd, 3 * config.n_embd), (config.n_embd, config.n_embd)]
layers += [(config.n_embd, 4 * config.n_embd), (4 * config.n_embd, config.n_embd)]
assert n_trained == config.n_layer * lora.rank * sum(n_in + n_out for n_in, n_out in layers)

# %% [markdown]
"""
## Tuning

The trainer takes the options of the adapter; gradients, clipping, AdamW and checkpoints then hold the adapter alone.
`scripts/finetune.py --lora-rank 8` does the same with a run folder around it.
"""

# %%
tune = TrainSettings(dtype="float32", batch_size=16, accumulate=1, steps=200, warmup=20, lr=4e-3, min_lr=4e-4)
losses, after = {}, {}
for rank in (1, 8):
    trainer = Trainer(config, tune, folder / "base", attention="sdpa", lora=LoraConfig(rank=rank, alpha=2.0 * rank))
    losses[f"rank {rank}"] = run(trainer, upper_train)
    after[f"rank {rank}"] = evaluate(trainer, upper_validation, 16)
full = Trainer(config, tune, folder / "base", attention="sdpa")
losses["all parameters"] = run(full, upper_train)
after["all parameters"] = evaluate(full, upper_validation, 16)
for name, loss in after.items():
    print(f"{name:<15} {loss:.3f} nats per byte on capitals, from {before['capitals']:.3f}")
assert after["rank 8"] < after["rank 1"] < before["capitals"], "a larger rank learns more"
assert before["capitals"] - after["rank 8"] > 0.5 * (before["capitals"] - before["lower case"])

figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
for name, curve in losses.items():
    axes.plot(curve, label=name)
axes.set(xlabel="step", ylabel="training loss (nats per byte)")
axes.legend()
plt.show()

# %% [markdown]
"""
## The base has not changed

The weights beside the adapters are those of the file, to the bit. Without its adapters the model is the base again,
with the base's loss on the old text.
"""

# %%
tuned = trainer.model  # of rank 8
stored = gpt_torch.load_pretrained(folder / "base").state_dict()
assert all(torch.equal(value, stored[name]) for name, value in tuned.state_dict().items() if name in stored)
assert set(tuned.state_dict()) - set(stored) == {name for name, p in tuned.named_parameters() if p.requires_grad}

# %% [markdown]
"""
## Merging

`merge` adds scale · A B to the weights, in a copy without adapters. Its logits differ from those of the adapted model
by rounding alone, and the singular values of the change show its rank: 8 of them are not zero.
"""

# %%
merged = gpt_torch.merge(tuned)
with torch.no_grad():
    difference = (merged(ids) - tuned(ids)).abs().max().item()
    size = tuned(ids).abs().max().item()
print(f"largest difference of a logit: {difference:.1e}, of logits up to {size:.0f}")
assert difference < 1e-5 * size

name = "h.0.mlp.c_fc.weight"
unchanged = gpt_torch.load_pretrained(folder / "base")
old, new = (gpt_torch.export_weights(m)[name].astype(np.float64) for m in (unchanged, merged))
values = np.linalg.svd(new - old, compute_uv=False)
print("singular values of the change:", *(f"{value:.1e}" for value in values[:10]), "...")
assert values[7] > 1e3 * values[8], "the change has rank 8"

# %% [markdown]
"""
## The files, in the other framework

The folder has the form of the package peft. JAX puts the adapter on its own copy of the base and draws the same text.
"""

# %%
gpt_torch.save_adapter(tuned, folder / "adapter", base=str(folder / "base"))
sizes = {name: sum(f.stat().st_size for f in (folder / name).iterdir()) for name in ("base", "adapter")}
print(", ".join(f"{name}: {size / 1e3:.0f} kB" for name, size in sizes.items()))
assert sizes["adapter"] < sizes["base"] / 4
options = json.loads((folder / "adapter" / "adapter_config.json").read_text())
print({key: options[key] for key in ("peft_type", "r", "lora_alpha", "target_modules")})

prompt = [tokenizer.encode("THE RETURN ")]
texts = {}
for package in (gpt_torch, gpt_jax):
    model = package.load_pretrained(folder / "base")
    [row] = package.generate(model, prompt, 60, temperature=0.5, seed=0)
    package.load_adapter(model, folder / "adapter")
    [adapted] = package.generate(model, prompt, 60, temperature=0.5, seed=0)
    texts[package] = row, adapted
assert texts[gpt_torch] == texts[gpt_jax], "the same tokens in both frameworks, with and without the adapter"
print("base:   ", repr(tokenizer.decode(row)))
print("adapted:", repr(tokenizer.decode(adapted)))

# Capital letters among all letters of the new tokens.
letters = [chr(token) for token in adapted[len(prompt[0]) :] if chr(token).isalpha()]
assert np.mean([letter.isupper() for letter in letters]) > 0.9, "the adapted model writes capitals"

# %%
shutil.rmtree(folder)
