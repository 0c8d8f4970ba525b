"""What the training loop needs of a backend."""

from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from parity.config import GPTConfig
from parity.data.windows import Dataset
from parity.weights import Row


class Trainer(Protocol):
    """A model with its optimizer, as a backend implements it."""

    config: GPTConfig
    stored: Sequence[Row]
    """The rows of the parameters that save() writes: all of the model's, or those of its adapters."""

    def local_slice(self, size: int) -> slice:
        """Return the slice of a batch of `size` rows that this process computes (all of it in a one-process run)."""

    def to_device(self, inputs: np.ndarray, targets: np.ndarray, *more: np.ndarray) -> tuple[Any, ...]:
        """Start the transfer of a batch to the device.

        Called on another thread than the other methods.

        Args:
            inputs: Token ids int32 [..., B, T] of the rows in local_slice().
            targets: For the next token, the token ids to predict, of the same shape; IGNORE_INDEX where there is none.
                What it is for another objective, its module says; the first axes are those of the inputs.
            *more: What else the objective needs, with the same first axes. Floating-point numbers get the dtype of the
                parameters.

        Raises:
            InputError: For an input outside the vocabulary, and for targets that are not valid.
        """

    def train_step(self, batch: Sequence[Any], lr: float, step: int) -> dict[str, Any]:
        """Make one optimizer step.

        If the loss or the gradient is not finite, the model and the optimizer stay as they were.

        Args:
            batch: What to_device() returned for arrays [A, B, ...], A micro-batches.
            lr: Learning rate of the step.
            step: Number of the step, from 0; dropout depends on it.

        Returns:
            "loss", the mean of the objective's terms (in nats per target), and "grad_norm", before clipping; both may
            still be on the device.
        """

    def evaluate_batch(self, batch: Sequence[Any]) -> Any:
        """Return the loss in nats, without dropout, summed over the terms of the objective in all processes.

        Args:
            batch: What to_device() returned for arrays [B, ...].
        """

    def evaluate_rows(self, batch: Sequence[Any]) -> np.ndarray:
        """Return what the objective measures of each row, [B, ...] of all processes, without dropout.

        All processes call it with their rows of the same batch. Not every objective has something to measure.

        Args:
            batch: What to_device() returned for arrays [B, ...].
        """

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Continue prompts; the options are those of the backend's `generate`."""

    def save(self, folder: Path) -> None:
        """Write model.safetensors with config.json, or the adapters, and whatever else a resumed run needs.

        All processes call it with the same folder.
        """

    def restore(self, folder: Path) -> None:
        """Load what the save() of either backend wrote; raises InputError if it is another model's."""


class SizedDataset(Dataset, Sized, Protocol):
    """A dataset that knows the number of its rows."""


def evaluate_all_rows(trainer: Trainer, dataset: SizedDataset, batch_size: int) -> np.ndarray:
    """Return what evaluate_rows() measures of each row of a dataset, float64 [len(dataset), ...].

    All processes call this with the same arguments.
    """
    batches = dataset.in_order(batch_size, trainer.local_slice(batch_size))
    rows = [trainer.evaluate_rows(trainer.to_device(*batch)) for batch in batches]
    return np.concatenate(rows).astype(np.float64)[: len(dataset)]
