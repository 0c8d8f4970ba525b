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
# Many devices on one CPU

JAX can pretend that a CPU is eight devices. They are slow, but they run the same partitioned program as eight GPUs,
except that XLA chooses some messages differently: on a CPU mostly an all-reduce where a GPU would use a reduce-scatter.
We train one model on several meshes, compare the losses, and look at what each device holds and sends. The whole
notebook takes about a minute on two CPU cores.

What should come out:

- the losses of all meshes are those of one device, but for rounding: float64 shows 1e-12 or less;
- each device holds the share of the parameters that the rules give it;
- the compiled program contains the messages that the kind of parallelism needs, and one device needs none;
- a run that was saved on eight devices continues on one.
"""

# %%
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA logs what it cannot shard well

import jax

# Before the first computation: JAX reads it when it starts. JAX_NUM_CPU_DEVICES=8 does the same for a script.
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)

import matplotlib.pyplot as plt
import numpy as np

from gpt_jax import hlo
from gpt_jax.lowering import StepOptions, lower_train_step
from gpt_jax.memory import communication_bytes
from gpt_jax.sharding import MeshShape, bytes_per_device, make_mesh
from gpt_jax.train import Trainer
from parity import GPTConfig
from parity.training.settings import TrainSettings

print(f"{len(jax.devices())} devices")
assert len(jax.devices()) == 8

# %% [markdown]
"""
## One model, five meshes

A mesh has three axes. Along `data`, each device has the whole model and a part of the batch. Along `fsdp`, it also has
a part of the batch, and only its shard of each parameter, which is gathered where it is used. Along `tensor`, it has
some of the heads and a part of the MLP.
"""

# %%
config = GPTConfig(n_vocab=257, n_ctx=32, n_embd=64, n_head=4, n_layer=2)
settings = TrainSettings(dtype="float64", batch_size=8, accumulate=1, steps=8)
MESHES = {
    "one device": None,
    "data=8": MeshShape(data=8),
    "fsdp=8": MeshShape(fsdp=8),
    "tensor=4": MeshShape(tensor=4),
    "data=2,fsdp=2,tensor=2": MeshShape(data=2, fsdp=2, tensor=2),
}
generator = np.random.default_rng(0)
tokens = generator.integers(0, config.n_vocab, (1, settings.batch_size, config.n_ctx + 1), np.int32)


def train(trainer, steps):
    """Return the losses of the steps, all of them on the same batch."""
    batch = trainer.to_device(tokens[..., :-1], tokens[..., 1:])
    return np.array([float(trainer.train_step(batch, lr=1e-2, step=step)["loss"]) for step in steps])


trainers = {name: Trainer(config, settings, mesh=shape and make_mesh(shape)) for name, shape in MESHES.items()}
losses = {name: train(trainer, range(settings.steps)) for name, trainer in trainers.items()}
reference = losses["one device"]
print("one device:", *(f"{loss:.6f}" for loss in reference))
for name, values in losses.items():
    largest = np.abs(values - reference).max()
    print(f"{name:<24} largest difference of a loss {largest:.1e}")
    assert largest < 1e-12, "the same losses on every mesh"
assert reference[-1] < reference[0], "and the model learns"

# %% [markdown]
"""
## What each device holds

The rules name the axes of a parameter by their letters (`parity/weights/table.py`) and the mesh axis along which each
letter is sharded; a vocabulary of 257 cannot be divided. Here is one matrix, the projection to queries, keys and
values with axes D, C, N and H, of both layers:
"""

# %%
for name, trainer in trainers.items():
    kernel = trainer.model.trf_blocks.att.qkv_proj.kernel[...]  # [L, D, C, N, H]
    shards = {shard.data.shape for shard in kernel.addressable_shards}
    assert len(shards) == 1, "all shards have the same shape"
    print(f"{name:<24} {kernel.shape} -> {len(kernel.addressable_shards)} x {shards.pop()}")

held = {}
for name, trainer in trainers.items():
    parameters = jax.tree.leaves(trainer.state.model)
    [device, *_] = parameters[0].devices()
    held[name] = sum(
        shard.data.nbytes for leaf in parameters for shard in leaf.addressable_shards if shard.device == device
    )
    assert held[name] == bytes_per_device(config, MESHES[name] or MeshShape(), itemsize=8)
assert held["data=8"] == held["one device"], "data: a whole copy on each device"
assert held["fsdp=8"] < held["one device"] / 7, "fsdp: nearly an eighth"

# %% [markdown]
"""
## What they send

XLA inserts the messages. We compile the training step for each mesh, without running it, and count them.
"""

# %%
MESSAGES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
compiled, sent = {}, {}
print(f"{'mesh':<24} {'held':>9} {'sent per step':>13}  messages in the program")
for name, shape in MESHES.items():
    place = jax.devices()[0] if shape is None else make_mesh(shape)
    program = hlo.parse(lower_train_step(config, settings, StepOptions(), place).compile().as_text())
    kinds = [
        operation.kind.removesuffix("-start")
        for computation in program.computations.values()
        for operation in computation.values()
    ]
    compiled[name] = Counter(kind for kind in kinds if kind in MESSAGES)
    sent[name] = sum(communication_bytes(config, shape or MeshShape(), 8, 1, "float64", "cpu").values())
    counts = ", ".join(f"{count} {kind}" for kind, count in sorted(compiled[name].items())) or "none"
    print(f"{name:<24} {held[name] / 1e3:6.0f} kB {sent[name] / 1e3:10.0f} kB  {counts}")
assert not compiled["one device"]
assert compiled["data=8"]["all-reduce"], "data: gradients are summed"
assert not compiled["data=8"]["all-gather"], "data: nothing is gathered"
assert compiled["fsdp=8"]["all-gather"], "fsdp: parameters are gathered"
assert compiled["tensor=4"]["all-reduce"], "tensor: activations are summed"
assert compiled["fsdp=8"]["reduce-scatter"] < compiled["fsdp=8"]["all-reduce"], "fsdp: gradients are mostly all-reduced"

figure, axes = plt.subplots(figsize=(7, 3), layout="constrained")
places = np.arange(len(MESHES))
axes.bar(places - 0.2, [held[name] / 1e3 for name in MESHES], 0.4, label="parameters held")
axes.bar(places + 0.2, [sent[name] / 1e3 for name in MESHES], 0.4, label="sent per step")
axes.set_xticks(places, MESHES)
axes.set(ylabel="kB per device")
axes.legend()
plt.show()

# %% [markdown]
"""
## Another number of devices

A checkpoint does not depend on the mesh: each device writes its shard, and any mesh can read them. We train four
steps on eight devices, save, and run the other four on one device.
"""

# %%
folder = Path(tempfile.mkdtemp()) / "checkpoint"
on_eight = Trainer(config, settings, mesh=make_mesh(MESHES["fsdp=8"]))
first_half = train(on_eight, range(4))
folder.mkdir()
on_eight.save(folder)
on_one = Trainer(config, settings)
on_one.restore(folder)
second_half = train(on_one, range(4, 8))
shutil.rmtree(folder.parent)
largest = np.abs(np.concatenate([first_half, second_half]) - reference).max()
print(f"four steps on eight devices and four on one: largest difference of a loss {largest:.1e}")
assert largest < 1e-12

# %% [markdown]
"""
On a machine with several GPUs, `python scripts/train_jax.py --mesh data=2,fsdp=2,tensor=2` does the
same. PyTorch runs one process per device, with the same losses: [Many devices and processes](../guides/scale.md).
"""
