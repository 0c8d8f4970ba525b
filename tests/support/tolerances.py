"""Tolerances that several tests share; tests/test_planted_errors.py shows that each one catches real errors."""

import numpy as np

LOGITS_ATOL = {np.float64: 1e-12, np.float32: 2e-5}
"""Largest absolute difference of a logit, by dtype.

float64: products of at most 388 terms of size 1, three layers deep, round by about 1e-13. float32 rounds 2**29 times
as much, which is 5e-5 of a logit of size 10 in the worst case; the tests print what they measure, below 1e-5.
"""
GRADIENT_RTOL = {np.float64: 1e-10, np.float32: 2e-5}
"""Largest difference of a gradient, relative to the largest element of its parameter's gradient.

float64 rounds by about 1e-14 per layer; float32 by 2**29 times that, measured at 2e-6.
"""
LOSS_RTOL = {np.float64: 1e-12, np.float32: 5e-7}
"""Largest relative difference of a loss."""
