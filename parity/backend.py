"""What a backend offers to comparisons: NumPy in, NumPy out, so that no comparison sees a tensor."""

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from parity.config import GPTConfig

Weights = Mapping[str, np.ndarray]  # in the huggingface format; their dtype is the one computed in


class Backend(Protocol):
    """Fulfilled by gpt_torch.backend and gpt_jax.backend, on the CPU or with full-precision products."""

    def logits(self, config: GPTConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
        """tokens int [B, T] -> logits [B, T, V] in the dtype of the weights."""

    def loss_and_gradients(
        self, config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean cross-entropy in nats over targets [B, T] that are not NO_TARGET, and its gradients by name."""
