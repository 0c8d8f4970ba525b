"""The interface of an implementation of GPT-2 in a comparison: NumPy arrays in, NumPy arrays out.

An implementation is a module with some or all of the functions of `Backend`. gpt_torch.adapter and
gpt_jax.adapter have all of them, parity.reference has those of a forward pass, and scripts/parity_hf.py shows
how another implementation, that of Hugging Face transformers, joins a comparison.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from parity.config import GPTConfig
from parity.reference import Weights
from parity.training.settings import TrainSettings


@dataclasses.dataclass(frozen=True)
class Compute:
    """The dtype, device and matmul precision that an implementation computes with."""

    dtype: str | None = None
    """float32, float64 or bfloat16; None means the dtype of the weights."""
    device: str = "cpu"
    """cpu or gpu."""
    precision: str = "highest"
    """Precision of float32 matrix products: "highest" is full float32, "default" allows TF32 on GPUs that have it."""

    def dtype_for(self, weights: Weights) -> str:
        """The dtype to compute in, given the weights."""
        return self.dtype or next(iter(weights.values())).dtype.name


DEFAULT_COMPUTE = Compute()


class Batch(NamedTuple):
    """The input of one optimizer step."""

    inputs: np.ndarray
    """int32 [A, B, T], where A is the number of micro-batches."""
    targets: np.ndarray
    """int32 [A, B, T]."""
    lr: float
    """Learning rate of the step."""


class Backend(Protocol):
    """The functions that a comparison calls. A section of the report needs only some of them."""

    def open_folder(self, folder: Path) -> "Backend":
        """Return an implementation of the model that the config.json of a folder describes.

        Only an implementation that reads config.json itself has this function. It is called if the weights of the
        comparison come from a folder with that file. The configuration in each call, which is this project's reading
        of the file, then serves only for its shapes.
        """

    def activations(
        self,
        config: GPTConfig,
        weights: Weights,
        tokens: np.ndarray,
        names: Iterable[str] | None = None,
        compute: Compute = DEFAULT_COMPUTE,
    ) -> dict[str, np.ndarray]:
        """Compute the named activations (see parity.taps) of tokens int [B, T]; None means all of them.

        An implementation may return only those that it has.
        """

    def cached_logits(
        self,
        config: GPTConfig,
        weights: Weights,
        tokens: np.ndarray,
        start: int,
        compute: Compute = DEFAULT_COMPUTE,
    ) -> np.ndarray:
        """Compute the logits [B, T - start, V] of positions `start` to T - 1 with a key-value cache.

        The tokens up to position `start` are the prompt; each later token is fed alone.
        """

    def generate(
        self, config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
    ) -> list[list[int]]:
        """Sample a continuation of each prompt, with the options of the backends' public `generate`."""

    def loss_and_gradients(
        self,
        config: GPTConfig,
        weights: Weights,
        inputs: np.ndarray,
        targets: np.ndarray,
        compute: Compute = DEFAULT_COMPUTE,
    ) -> tuple[float, dict[str, np.ndarray]]:
        """Compute the mean cross-entropy in nats over the targets [B, T] that count, and its gradients by name."""

    def train(
        self,
        config: GPTConfig,
        weights: Weights,
        settings: TrainSettings,
        batches: Iterable[Batch],
        after_step: Callable[[dict[str, np.ndarray]], None] | None = None,
    ) -> list[tuple[float, float]]:
        """Train from these weights with the backend's Trainer, on the CPU, in the settings' dtype.

        Args:
            after_step: Called after each step with the new weights, in the huggingface format.

        Returns:
            The loss and the gradient norm of each step.
        """


def train_steps(
    trainer: Any,
    export_weights: Callable[[], Weights],
    batches: Iterable[Batch],
    after_step: Callable[[dict[str, np.ndarray]], None] | None,
) -> list[tuple[float, float]]:
    """Run one optimizer step per batch: what the `train` functions of both adapters share.

    `export_weights` returns the trainer's current weights; `after_step` gets copies of them.
    """
    metrics = []
    for step, (inputs, targets, lr) in enumerate(batches):
        result = trainer.train_step(trainer.to_device(inputs, targets), lr, step)
        metrics.append((float(result["loss"]), float(result["grad_norm"])))
        if after_step is not None:
            after_step({name: array.copy() for name, array in export_weights().items()})
    return metrics
