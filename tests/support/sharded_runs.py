"""Program of test_sharding.py, for a process with eight CPU devices: the losses and facts of each mesh, as JSON."""

import dataclasses
import json
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import gpt_jax.train
from gpt_jax import hlo, roofline
from gpt_jax.generate import generate
from gpt_jax.loss import Tiling, head_loss
from gpt_jax.lowering import StepOptions, lower_train_step
from gpt_jax.memory import communication_bytes
from gpt_jax.sharding import MeshShape, make_mesh
from gpt_jax.train import Trainer
from parity.config import PRESETS, GPTConfig
from parity.training import checkpoints
from parity.training.settings import recipe
from parity.weights import LoraConfig, rows

CONFIG = GPTConfig(n_vocab=96, n_ctx=16, n_embd=64, n_head=8, n_layer=2)
SETTINGS = recipe("tiny").settings
ALL = [(d, f, t) for d in (1, 2, 4, 8) for f in (1, 2, 4, 8) for t in (1, 2, 4, 8) if d * f * t == 8]
FEW = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2)]
GENERATING = [(8, 1, 1), (2, 2, 2)]  # of FEW: replicated, and sharded over each axis
SMALL_CHUNKS = Tiling(largest_chunk=2 * CONFIG.n_vocab, vocab_multiple=1)
# What is trained in place of the whole model.
PARTS = {
    "adapters": {"lora": LoraConfig(rank=3, targets=("q", "v", "mlp.out"))},
    "last layer": {"table": [dataclasses.replace(row, layers=(1,)) for row in rows(CONFIG) if row.per_layer]},
}
PROMPTS = [[1, 2, 3], [4]]
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
OF_THE_SCALING_PAGE = [(8, 1, 1), (1, 8, 1), (2, 2, 2)]


def batch(step):
    ids = np.random.default_rng(step).integers(0, CONFIG.n_vocab, (2, 8, CONFIG.n_ctx + 1), dtype=np.int32)
    return ids[..., :-1], ids[..., 1:]


def make(settings, shape=None, **options):
    return Trainer(CONFIG, settings, mesh=None if shape is None else make_mesh(MeshShape(*shape)), **options)


def head_losses(shape, width):
    """Return the loss of the head and its gradients, in several chunks and on a mesh that does not divide T."""
    generator = np.random.default_rng(0)
    x, head = (jnp.asarray(generator.normal(size=size)) for size in ((8, 5, width), (CONFIG.n_vocab, width)))
    targets = generator.integers(-1, CONFIG.n_vocab, (8, 5), dtype=np.int32)
    mesh = None if shape is None else make_mesh(MeshShape(*shape))
    loss = jax.jit(jax.value_and_grad(lambda *arrays: head_loss(*arrays, targets, SMALL_CHUNKS, mesh), (0, 1)))
    return [np.asarray(leaf).tolist() for leaf in jax.tree.leaves(loss(x, head))]


def losses(trainer, first, last):
    return [float(trainer.train_step(trainer.to_device(*batch(s)), 1e-3, s)["loss"]) for s in range(first, last)]


def partial_losses(settings, shape, options, folder):
    """Return the losses of a run that trains a part of the model, and those after a resume of it on the same mesh."""
    trainer = make(settings, shape, **options)
    first = losses(trainer, 0, 3)
    saved = checkpoints.save(folder, 3, trainer.save, keep=1)
    # Another seed: a frozen part that is not restored would differ, except for the base of an adapter.
    resumed = make(settings if "lora" in options else dataclasses.replace(settings, seed=1), shape, **options)
    resumed.restore(saved)
    return first + losses(trainer, 3, 6), losses(resumed, 3, 6)


def facts(trainer):
    """Return the bytes of parameters and moments on each device, and count the collectives of the compiled step."""
    held = {}
    for leaf in jax.tree.leaves(trainer.state):
        for shard in leaf.addressable_shards:
            held[shard.device.id] = held.get(shard.device.id, 0) + shard.data.nbytes
    numbers = (trainer._to_mesh(number) for number in (np.asarray(1e-3, trainer._param_dtype), np.asarray(0, np.int32)))
    step = trainer._train_step.lower(trainer.state, trainer.to_device(*batch(0)), *numbers)
    program = step.compile().as_text()  # the cache of compiled programs has it
    return {
        "bytes": sorted(set(held.values())),
        "devices": len(held),
        "collectives": {name: len(re.findall(rf" {name}(?:-start)?\(", program)) for name in COLLECTIVES},
    }


def communication(shape):
    """Return the bytes that a device sends in a step of 124M, those of plan.py, and the loops over the loss's chunks.

    The head is untied: on a CPU, XLA sums the two gradients of a tied embedding separately.
    """
    shape = MeshShape(*shape)
    config = dataclasses.replace(PRESETS["124M"], tied_head=False)
    settings = dataclasses.replace(recipe("124M").settings, batch_size=32, accumulate=2, dtype="float32")
    text = lower_train_step(config, settings, StepOptions(), make_mesh(shape)).compile().as_text()
    program = hlo.parse(text)

    def collectives(loop):
        body = dataclasses.replace(program, entry=loop.called)
        return roofline.read(body, "H100", shape.size).categories(messages=True)

    chunk_loops = [
        {"iterations": loop.trip_count, "collectives": collectives(loop)}
        for loop in program.loops()
        if "head_loss" in program.functions(loop)
    ]
    planned = communication_bytes(config, shape, settings.micro_size, 2, "float32", "cpu")
    sent = roofline.read(program, "H100", shape.size).total(messages=True).nbytes
    return {"sent": sent, "planned": sum(planned.values()), "chunk loops": chunk_loops}


def main(dtype, shapes, out):
    jax.config.update("jax_enable_x64", dtype == "float64")
    gpt_jax.train.tiling_for = lambda platform: SMALL_CHUNKS
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    results = {}
    single = make(settings)
    expected = single.generate(PROMPTS, 20, seed=1)
    results["tokens"], results["same tokens"] = expected, {}
    results["head"] = {str(shape): head_losses(shape, 16) + head_losses(shape, 15) for shape in (None, *shapes)}
    results["single"] = {"losses": losses(single, 0, 20), **facts(single)}
    with tempfile.TemporaryDirectory() as folder:
        for shape in shapes:
            trainer = make(settings, shape)
            if shapes is ALL or shape in GENERATING:
                tokens = generate(trainer.model, PROMPTS, 20, seed=1)  # not gathered, and beyond the context
                results["same tokens"][str(shape)] = tokens == expected
            first = losses(trainer, 0, 10)
            saved = checkpoints.save(Path(folder) / str(shape), 10, trainer.save, keep=1)
            results[str(shape)] = {"losses": first + losses(trainer, 10, 20), **facts(trainer)}
        # Saved on one mesh, restored on another, and on one device.
        for shape in (shapes[0], shapes[2], None):
            trainer = make(settings, shape)
            trainer.restore(saved)
            results[f"restored {shape}"] = {"losses": losses(trainer, 10, 20)}
        results["parts"] = {}
        for name, options in PARTS.items() if shapes is ALL else [("adapters", PARTS["adapters"])]:
            results["parts"][name] = {
                str(shape): partial_losses(settings, shape, options, Path(folder) / f"{name} {shape}")
                for shape in (None, (2, 2, 2))
            }
    if shapes is FEW:
        results["communication"] = {str(shape): communication(shape) for shape in OF_THE_SCALING_PAGE}
    out.write_text(json.dumps(results))


if __name__ == "__main__":
    main(sys.argv[1], {"all": ALL, "few": FEW}[sys.argv[2]], Path(sys.argv[3]))
