"""Tolerances that several tests share; tests/test_planted_errors.py shows that each one catches real errors."""

import numpy as np

from parity.comparison.error_bounds import activation_bounds

LOGITS_ATOL = {np.float64: 1e-12, np.float32: 2e-5}
"""Largest absolute difference of a logit of TINY, by dtype. The bounds that rounding allows are 3e-14 and 1.4e-5."""
GRADIENT_RTOL = {np.float64: 1e-10, np.float32: 2e-5}
"""Largest difference of a gradient, relative to the largest element of its parameter's gradient.

float64 rounds by about 1e-14 per layer; float32 by 2**29 times that, measured at 4e-6 on an Intel Xeon with AVX-512.
"""
LOSS_RTOL = {np.float64: 1e-12, np.float32: 5e-7}
"""Largest relative difference of a loss: four roundings of float32. The mean over tokens averages their errors."""


def logits_bound(config, weights, tokens, dtype):
    """Return how far rounding may move a logit in a dtype on any processor; see parity/comparison/error_bounds.py."""
    return activation_bounds(config, weights, tokens, np.dtype(dtype).name, ["logits"])[1]["logits"]
