"""Training in full precision: what a trainer has trained, and what it has left as it was."""

import contextlib

import jax
import numpy as np

import gpt_jax.train
from parity.weights import conversion


@contextlib.contextmanager
def full_precision():
    with jax.enable_x64(True), jax.default_matmul_precision("highest"):
        yield


def train_steps(name, trainer, batches, lr):
    """Train, and return ([(loss, norm)], [trained arrays before and after each step]); check the frozen ones."""
    before, metrics, trail = frozen_arrays(name, trainer), [], [trained_arrays(name, trainer)]
    for step, batch in enumerate(batches):
        result = trainer.train_step(trainer.to_device(*batch), lr, step)
        metrics.append((float(result["loss"]), float(result["grad_norm"])))
        trail.append(trained_arrays(name, trainer))
    for old, new in zip(before, frozen_arrays(name, trainer), strict=True):
        np.testing.assert_array_equal(old, new)
    return np.array(metrics), trail


def trained_arrays(name, trainer):
    """The trained parameters in the huggingface format."""
    if name == "torch":
        format = "torch"
        arrays = {n: p.detach().numpy() for n, p in trainer.model.named_parameters() if p.requires_grad}
    else:
        format, state = "flax", gpt_jax.train._to_arrays(trainer.state)
        arrays = {n.removeprefix("parameters."): np.asarray(a) for n, a in state.items() if n.startswith("parameters.")}
    converted = conversion.convert(arrays, format, "huggingface", trainer.config, table=trainer.trainable)
    return {n: np.array(a) for n, a in converted}


def frozen_arrays(name, trainer):
    if name == "torch":
        return [p.detach().numpy().copy() for p in trainer.model.parameters() if not p.requires_grad]
    return [np.array(leaf) for leaf in jax.tree.leaves(trainer._frozen)]
