"""What a trainer has trained, and what it has left as it was."""

import jax
import numpy as np

import gpt_jax.train
from parity.weights import conversion


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
