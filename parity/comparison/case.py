"""The input of a comparison: the model, weights, tokens and settings that both implementations get."""

import dataclasses

import numpy as np

from parity.comparison.protocol import Compute, Weights
from parity.config import GPTConfig
from parity.weights import initial_weights


@dataclasses.dataclass(frozen=True)
class Case:
    """The input of both implementations."""

    config: GPTConfig
    weights: Weights
    tokens: np.ndarray
    """int32 [B, T + 1]: the first T are the inputs, the last T the targets."""
    compute: Compute
    names: list[str]
    """Activations to compare."""
    steps: int = 5
    """Number of optimizer steps."""
    new_tokens: int = 32
    """Number of tokens to sample per prompt."""

    @property
    def inputs(self) -> np.ndarray:
        """int32 [B, T]."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> np.ndarray:
        """int32 [B, T]."""
        return self.tokens[:, 1:]

    @property
    def dtype(self) -> str:
        """The dtype that both compute in."""
        return self.compute.dtype_for(self.weights)


def sharp_weights(config: GPTConfig, seed: int) -> dict[str, np.ndarray]:
    """Draw initial weights with matrices five times as large and random biases.

    With these, unlike with fresh weights, attention is sharp and logits exceed 1, so that errors show.
    """
    generator = np.random.default_rng(seed)
    arrays = initial_weights(config, seed)
    for name, array in arrays.items():
        if "bias" in name:
            array += generator.normal(size=array.shape).astype(np.float32) * 0.1
        elif "ln_" not in name and name not in ("wte.weight", "wpe.weight"):
            array *= 5
    return arrays


def random_tokens(config: GPTConfig, batch: int, positions: int, seed: int = 0) -> np.ndarray:
    """Draw random token ids int32 [batch, positions + 1]."""
    return np.random.default_rng(seed).integers(0, config.n_vocab, (batch, positions + 1), dtype=np.int32)
