"""What an implementation offers to comparisons: NumPy in, NumPy out, so that no comparison sees a tensor.

An implementation is a module, or any object, with some of the methods below; gpt_torch.adapter, gpt_jax.adapter
and parity.reference have them all or most, scripts/parity_hf.py shows how Hugging Face's model joins.
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from parity.config import GPTConfig
from parity.training.settings import TrainSettings

Weights = Mapping[str, np.ndarray]  # in the huggingface format


@dataclasses.dataclass(frozen=True)
class Compute:
    """In what an implementation computes."""

    dtype: str | None = None
    """float32, float64 or bfloat16; by default that of the weights"""
    device: str = "cpu"
    """cpu or gpu"""
    precision: str = "highest"
    """highest: products in full; default: the framework's own, which is TF32 for JAX on a GPU"""

    def of(self, weights: Weights) -> str:
        return self.dtype or next(iter(weights.values())).dtype.name


FULL = Compute()


class Batch(NamedTuple):
    """What one optimizer step is given."""

    inputs: np.ndarray
    """int32 [A, B, T], A micro-batches"""
    targets: np.ndarray
    """int32 [A, B, T]"""
    lr: float


class Backend(Protocol):
    """Fulfilled by gpt_torch.adapter and gpt_jax.adapter."""

    def logits(self, config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Compute = FULL) -> np.ndarray:
        """tokens int [B, T] -> logits [B, T, V], at least float32."""

    def activations(
        self,
        config: GPTConfig,
        weights: Weights,
        tokens: np.ndarray,
        names: Iterable[str] | None = None,
        compute: Compute = FULL,
    ) -> dict[str, np.ndarray]:
        """{name of parity/taps.py: activation}; an implementation may have some of them only."""

    def cached_logits(
        self, config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute = FULL
    ) -> np.ndarray:
        """Logits [B, T - start, V] of positions `start` on: one token at a time, from cached keys and values."""

    def generate(
        self, config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
    ) -> list[list[int]]:
        """The rows of gpt_torch.generate or gpt_jax.generate with these options."""

    def loss_and_gradients(
        self,
        config: GPTConfig,
        weights: Weights,
        inputs: np.ndarray,
        targets: np.ndarray,
        compute: Compute = FULL,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Mean cross-entropy in nats over targets [B, T] that are not IGNORE_INDEX, and its gradients by name."""

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
