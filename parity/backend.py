"""What a backend offers to comparisons: NumPy in, NumPy out, so that no comparison sees a tensor."""

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple, Protocol

import numpy as np

from parity.config import GPTConfig
from parity.settings import TrainSettings

Weights = Mapping[str, np.ndarray]  # in the huggingface format; their dtype is the one computed in


class Batch(NamedTuple):
    """What one optimizer step is given."""

    inputs: np.ndarray
    """int32 [A, B, T], A micro-batches"""
    targets: np.ndarray
    """int32 [A, B, T]"""
    lr: float


class Backend(Protocol):
    """Fulfilled by gpt_torch.backend and gpt_jax.backend, on the CPU or with full-precision products."""

    def logits(self, config: GPTConfig, weights: Weights, tokens: np.ndarray) -> np.ndarray:
        """tokens int [B, T] -> logits [B, T, V] in the dtype of the weights."""

    def loss_and_gradients(
        self, config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean cross-entropy in nats over targets [B, T] that are not NO_TARGET, and its gradients by name."""

    def train(
        self,
        config: GPTConfig,
        weights: Weights,
        settings: TrainSettings,
        batches: Iterable[Batch],
        after: Callable[[dict[str, np.ndarray]], None] | None = None,
    ) -> list[tuple[float, float]]:
        """(loss, gradient norm) of each step of the backend's Trainer, from these weights, in the settings' dtype.

        `after` is given the weights, in the huggingface format, after each step.
        """
