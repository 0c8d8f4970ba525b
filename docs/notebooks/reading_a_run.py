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
# Reading a run

A training run leaves a folder. Here we make one, read every file in it, check what the files promise, damage a
checkpoint, and resume the run in both frameworks. The whole notebook takes about a minute on two CPU cores.

What should come out:

- the validation loss ends below that of the best bigram model, and recomputed from the checkpoint it is the number
  in the file;
- the learning rates in the file are those of the formula, and the hashes in the manifest are those of the files;
- a checkpoint with one flipped bit is not used;
- a run that lost its last steps repeats them and writes the same numbers, and the other framework nearly the same;
- the settings in which two runs differ are found, and only those.
"""

# %%
import dataclasses
import hashlib
import json
import math
import shutil
import tempfile
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from rich.console import Console

import gpt_jax.train
import gpt_torch.train
from parity import GPTConfig, load_model_and_tokenizer
from parity.training.args import JobArgs
from parity.training.job import load_job, start_run
from parity.training.loop import evaluate, resume_and_train
from parity.training.run_list import differences, summarize
from parity.training.schedule import learning_rate
from parity.training.settings import recipe

# %% [markdown]
"""
## A run

On the command line this is `python scripts/train_torch.py --n-layer 2 --n-embd 96` with a few more options, or the same
with `train_jax.py`. The function below does what these scripts do.
"""

# %%
folder = Path(tempfile.mkdtemp())
model = GPTConfig(n_vocab=257, n_ctx=64, n_embd=96, n_head=4, n_layer=2)
settings = dataclasses.replace(recipe("small").settings, steps=300, warmup=30, lr=4e-3, eval_every=100, keep=5)


def train(backend, name, settings=settings, resume=False):
    """Train or resume the run in folder/name, as the training scripts do."""
    args = JobArgs(run=folder / name, resume=resume, model=model, settings=settings)
    quiet = Console(quiet=True)
    job = load_job(args)
    trainer = backend.train.Trainer(job.config, job.settings, job.init_from)
    job = start_run(job, "torch" if backend is gpt_torch else "jax", {"device": "cpu"}, quiet)
    status = resume_and_train(trainer, job, quiet)
    assert status == 0
    return job, trainer


job, trainer = train(gpt_torch, "first")
run = folder / "first"
for file in sorted(run.rglob("*")):
    if file.is_file():
        print(f"{file.stat().st_size:>9,} {file.relative_to(run)}")

# %% [markdown]
"""
## config.json and env.json

The first holds everything that determines the losses; a resumed run refuses to change it. The second says where the
run ran.
"""

# %%
entries = json.loads((run / "config.json").read_text())
print({key: entries["train"][key] for key in ("steps", "batch_size", "lr", "min_lr", "warmup", "beta2", "seed")})
assert GPTConfig(**entries["model"]) == model
surroundings = json.loads((run / "env.json").read_text())
print(sorted(surroundings))
assert surroundings["backend"] == "torch"

# %% [markdown]
"""
## metrics.jsonl

One line per step, and one more per evaluation. Losses are in nats per token, which here is a byte.
"""

# %%
lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
print(*(json.dumps(line) for line in lines[:3]), sep="\n")
steps = {line["step"]: line for line in lines if "loss" in line}
validation = {line["step"]: line["validation_loss"] for line in lines if "validation_loss" in line}

assert sorted(steps) == list(range(1, settings.steps + 1)), "every step has its line"
expected = [
    learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps) for step in range(settings.steps)
]
assert np.allclose([steps[step + 1]["lr"] for step in range(settings.steps)], expected, rtol=1e-12)
final = validation[settings.steps]
print(f"validation loss {final:.3f}, bigram model {job.bigram:.3f}, guessing {math.log(model.n_vocab):.3f}")
assert final < job.bigram, "the model is better than the best bigram model"

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(list(steps), [line["loss"] for line in steps.values()], alpha=0.5, label="training")
left.plot(*zip(*sorted(validation.items()), strict=True), "o-", label="validation")
left.axhline(job.bigram, linestyle="--", color="gray", label="bigram")
left.set(xlabel="step", ylabel="loss (nats per byte)")
left.legend()
right.plot(list(steps), [line["lr"] for line in steps.values()], color="tab:green")
right.set(xlabel="step", ylabel="learning rate")
norm = right.twinx()
norm.plot(list(steps), [line["grad_norm"] for line in steps.values()], alpha=0.4)
norm.axhline(settings.clip, linestyle=":", color="gray")
norm.set(ylabel="norm of the gradient (dotted: clipped)")
plt.show()

# %% [markdown]
"""
## samples.txt

What the model wrote at each evaluation.
"""

# %%
for step, text in job.run.samples():
    print(f"step {step:3d}: {text.strip()[:90]!r}")

# %% [markdown]
"""
## checkpoints/

Each checkpoint has a manifest with the sha256 of every file. We compute them again, then load the weights and compute
the validation loss again.
"""

# %%
checkpoint = run / "checkpoints" / f"{settings.steps:06d}"
manifest = json.loads((checkpoint / "manifest.json").read_text())
for name, sha256 in manifest["files"].items():
    assert hashlib.sha256((checkpoint / name).read_bytes()).hexdigest() == sha256
    print(f"{sha256[:16]}... {name}")
assert manifest["step"] == settings.steps
assert manifest["run"] == entries["id"]

losses = {}
for backend in (gpt_torch, gpt_jax):
    other = backend.train.Trainer(model, settings, run)  # the weights of the run's newest checkpoint
    losses[backend.__name__] = evaluate(other, job.validation, settings.batch_size)
print(f"in the file {final:.9f}; recomputed", *(f"{loss:.9f} in {name}" for name, loss in losses.items()))
assert all(abs(loss - final) < 1e-5 for loss in losses.values())

texts = []
for backend in (gpt_torch, gpt_jax):
    loaded, tokenizer, _ = load_model_and_tokenizer(backend, run=run)
    [row] = backend.generate(loaded, [tokenizer.encode("The ")], 60, temperature=0.5, seed=0)
    texts.append(tokenizer.decode(row))
print(repr(texts[0]))
assert texts[0] == texts[1], "both frameworks read the checkpoint and write the same text"

# %% [markdown]
"""
## A damaged checkpoint

In a copy of the run we flip one bit of the newest weights. The run then resumes from the checkpoint before it, says
so, and repeats the last hundred steps. Its numbers are those of the run that was never interrupted, to the bit.
"""

# %%
shutil.copytree(run, folder / "damaged")
weights = folder / "damaged" / "checkpoints" / f"{settings.steps:06d}" / "model.safetensors"
content = bytearray(weights.read_bytes())
content[len(content) // 2] ^= 1
weights.write_bytes(content)

with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    train(gpt_torch, "damaged", resume=True)
messages = [str(w.message).replace(f"{folder}/", "") for w in caught if "model.safetensors" in str(w.message)]
assert messages, "the damage is noticed"
print(messages[0])


def numbers(name):
    """Return everything that metrics.jsonl records but for the times."""
    kept = ("step", "loss", "grad_norm", "lr", "validation_loss")
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [{key: line[key] for key in kept if key in line} for line in lines]


assert numbers("damaged") == numbers("first"), "a resumed run writes the same numbers, to the bit"

# %% [markdown]
"""
## The other framework

JAX resumes what PyTorch began, with the moments of AdamW. Its last hundred losses differ by what rounding has grown to.
"""

# %%
shutil.copytree(run, folder / "in-jax")
shutil.rmtree(folder / "in-jax" / "checkpoints" / f"{settings.steps:06d}")
train(gpt_jax, "in-jax", resume=True)
in_torch, in_jax = ({line["step"]: line["loss"] for line in numbers(n) if "loss" in line} for n in ("first", "in-jax"))
largest = max(abs(in_torch[step] - in_jax[step]) for step in in_torch)
print(f"largest difference of the last hundred losses: {largest:.1e} nats per byte")
assert in_torch != in_jax, "they are two computations"
assert largest < 1e-2

# %% [markdown]
"""
## Two runs

`scripts/runs.py` lists runs and shows in which settings they differ; these are the functions behind it.
"""

# %%
train(gpt_torch, "slow", dataclasses.replace(settings, lr=4e-4, steps=100, min_lr=4e-5))
for name in ("first", "slow"):
    summary = summarize(folder / name)
    print(f"{name:<6} {summary.state}, step {summary.steps}, best validation loss {summary.best_loss:.3f}")
changed = differences([folder / "first", folder / "slow"])
print({key: values for key, values in changed.items() if key != "id"})
assert set(changed) - {"id"} == {"train.lr", "train.min_lr", "train.steps"}

# %%
shutil.rmtree(folder)
