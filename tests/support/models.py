"""The backends, small configurations, weights and batches that tests compute with."""

import dataclasses

import numpy as np

import gpt_jax.adapter
import gpt_torch.adapter
from parity.config import PRESETS
from parity.weights import shapes

BACKENDS = {"torch": gpt_torch.adapter, "jax": gpt_jax.adapter}
TINY = PRESETS["tiny"]
CONFIGS = {
    "gpt2": TINY,
    "notebook": dataclasses.replace(TINY, qkv_bias=False, tied_head=False),
    "one layer": dataclasses.replace(TINY, n_layer=1),
}


def probing_weights(config, dtype=np.float64, seed=0):
    """Draw weights for which an error in any parameter is visible: sharp attention, curved GELUs, no value 0 or 1.

    The embeddings are small, so that LayerNorm's eps has a visible effect, too.
    """
    generator = np.random.default_rng(seed)
    scale = {"wte.weight": 0.15, "wpe.weight": 0.1}
    return {
        name: (generator.normal(size=shape) * scale.get(name, 0.4) + ("ln_" in name and "weight" in name)).astype(dtype)
        for name, shape in shapes(config, "huggingface").items()
    }


def random_batch(config, rows=2, seed=0):
    """Draw inputs and targets int32 [rows, n_ctx], with some targets ignored."""
    ids = np.random.default_rng(seed).integers(0, config.n_vocab, (rows, config.n_ctx + 1), dtype=np.int32)
    targets = ids[:, 1:].copy()
    targets[0, -5:] = -1
    return ids[:, :-1], targets
