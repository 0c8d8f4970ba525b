"""What a trainer minimizes, as far as both backends agree; gpt_*/loss.py, preference.py, ... have the losses."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

from parity.config import GPTConfig, is_counted

Reduction = Literal["sum", "mean"]
"""Of the log-probabilities of a response's tokens."""


def count_targets(targets: Any) -> Any:
    """Return the number of targets that are not ignored, a scalar of the backend."""
    return is_counted(targets).sum()


def is_pair(targets: Any) -> Any:
    """targets [..., 2T] -> whether a row is a pair of texts, booleans [...]; other rows only fill a batch."""
    return is_counted(targets).any(-1)


class Objective(NamedTuple):
    """A sum over the terms of all micro-batches and processes, divided by their number.

    The functions take arrays of the backend. Those of gpt_jax also take key=, tiling= and mesh= where a model is given.
    """

    summed_loss: Callable[..., Any]
    """(model, inputs, targets, *more) -> the sum of a micro-batch, a scalar."""
    n_terms: Callable[[Any], Any] = count_targets
    """targets -> the number of terms in the sum; rows that only fill a batch have none."""
    check: Callable[[GPTConfig, np.ndarray], None] = GPTConfig.check_targets
    """(config, targets) -> None; raises InputError for targets that are not valid."""
    rows: Callable[..., Any] | None = None
    """(model, inputs, targets, *more) -> [B, ...]: what evaluations measure of each row."""

    def check_batch(self, config: GPTConfig, inputs: np.ndarray, targets: np.ndarray) -> None:
        """Check a batch on the host, because a compiled function cannot raise.

        Raises:
            InputError: For an input outside the vocabulary, and for targets that are not valid.
        """
        config.check_tokens((1, 1), int(inputs.min(initial=0)), int(inputs.max(initial=0)))
        self.check(config, targets)
