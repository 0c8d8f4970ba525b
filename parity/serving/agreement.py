"""Two backends on one text: how far their logits differ at each token, and how far rounding alone may move them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from parity import reference
from parity.comparison.error_bounds import Rounding, propagated_errors
from parity.comparison.protocol import Weights
from parity.config import GPTConfig
from parity.errors import InputError
from parity.serving.display import rounded
from parity.serving.inspect import Subject, check_ids, token_logits
from parity.taps import probe

MOST_COMPARED = 256
"""Largest number of tokens whose error bounds are derived, by three runs of the model in float64."""


def logit_bounds(config: GPTConfig, weights: Weights, ids: Sequence[int], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the exact logits [T, V] of a text, and for each position the bound [T] on the error of any logit.

    The derivation is that of parity/comparison/error_bounds.py, position by position.
    """
    tokens = np.array([ids], np.int32)

    def compute(noise: dict[str, Rounding]) -> dict[str, np.ndarray]:
        with probe(config, ["logits"], {name: rounding.forward for name, rounding in noise.items()}) as cache:
            reference.logits(config, weights, tokens)
        return {str(position): cache["logits"][0, position] for position in range(len(ids))}

    exact, bounds = propagated_errors(config, dtype, len(ids), compute)
    return np.stack(list(exact.values())), np.array(list(bounds.values()))


def compare(subjects: Mapping[str, Subject], ids: Sequence[int], first: int) -> dict[str, Any]:
    """Compare two backends on a text whose tokens from number `first` on were generated: {rows, dtype}."""
    config = next(iter(subjects.values())).config
    check_ids(ids, config)
    if not 1 <= first <= len(ids):
        raise InputError(f"first must be in 1..{len(ids)}, got {first}")
    if len(ids) > MOST_COMPARED:
        raise InputError(f"the text has {len(ids)} tokens; error bounds are derived for up to {MOST_COMPARED}")
    logits = {name: token_logits(subject, ids) for name, subject in subjects.items()}
    weights = next(iter(subjects.values())).export_weights()
    dtype = next(iter(weights.values())).dtype.name
    return {"rows": compare_logits(config, weights, ids, first, logits, dtype), "dtype": dtype}


def compare_logits(
    config: GPTConfig, weights: Weights, ids: Sequence[int], first: int, logits: Mapping[str, np.ndarray], dtype: str
) -> list[dict[str, Any]]:
    """Compare the logits with which two backends predict each token from number `first` on.

    Args:
        config: Configuration of the model.
        weights: Its weights in the huggingface format.
        ids: The text.
        first: Number of the first token that was predicted.
        logits: {backend: logits [T, V] after each token of the text}, of two backends.
        dtype: The dtype in which the backends compute.

    Returns:
        For each predicted token, and for the one after the text, the largest difference of any logit, the largest error
        of each backend against float64, and the bound on it.
    """
    exact, bounds = logit_bounds(config, weights, ids, dtype)
    a, b = (np.asarray(z, np.float64) for z in logits.values())
    errors = {name: np.abs(z - exact).max(-1) for name, z in logits.items()}
    differences = np.abs(a - b).max(-1)
    return [
        {
            "difference": rounded(differences[position]),
            "errors": {name: rounded(error[position]) for name, error in errors.items()},
            "bound": rounded(bounds[position]),
        }
        for position in range(first - 1, len(ids))
    ]
