"""Initial weights: the same numbers for both backends."""

import math
import zlib
from typing import Any, Literal

import numpy as np

from parity.config import GPTConfig
from parity.weights.table import OUT_HEAD, rows, shapes


def initial_weights(
    config: GPTConfig, seed: int, dtype: Any = np.float32, scheme: Literal["gpt2", "torch"] = "gpt2"
) -> dict[str, np.ndarray]:
    """Return random initial weights; the numbers of a tensor depend only on the seed and on its name.

    Args:
        config: Configuration of the model.
        seed: Seed of the random generator (Philox; Salmon et al. 2011).
        dtype: Dtype of the result; numbers are drawn in float32.
        scheme: "gpt2", as in openai/gpt-2 src/model.py: normal with standard deviation 0.02, and 0.01 for
            position embeddings; biases 0, LayerNorm scale 1 and shift 0; projections onto the residual stream
            are scaled by 1/sqrt(2 L) (Radford et al. 2019, section 2.3). "torch", the defaults of torch.nn and
            so of the notebook's model: embeddings normal with standard deviation 1, matrices and biases uniform
            in +-1/sqrt(fan_in).

    Returns:
        {name: array} in the huggingface format; `shapes` has the shapes.
    """
    scale = {"normal": 0.02, "position": 0.01, "residual": 0.02 / math.sqrt(2 * config.n_layer)}
    sizes = shapes(config, "huggingface")
    weights = {}
    for row in rows(config):
        for name in row.names("huggingface", config):
            shape = sizes[name]
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
            if "ln_" in name or (scheme == "gpt2" and row.init == "zeros"):
                draw = np.full(shape, row.init == "ones", np.float32)
            elif scheme == "torch" and name not in ("wte.weight", "wpe.weight"):
                fan_in = config.n_embd if name == OUT_HEAD else sizes[name.replace("bias", "weight")][0]
                draw = generator.uniform(-1, 1, shape).astype(np.float32) / np.float32(math.sqrt(fan_in))
            else:
                draw = generator.standard_normal(shape, np.float32)
                draw *= scale[row.init] if scheme == "gpt2" else 1
            weights[name] = draw.astype(dtype, copy=False)
    return weights
