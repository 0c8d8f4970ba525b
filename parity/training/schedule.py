"""Learning rate of each step, computed on the host for both backends."""

import math


def learning_rate(step: int, peak: float, final: float, warmup: int, steps: int) -> float:
    """Return the learning rate of a step: a linear warm-up, then a half cosine (Loshchilov & Hutter 2017, SGDR).

    Without restarts, as in nanoGPT.

    Args:
        step: Number of the step, from 0.
        peak: Learning rate at the end of the warm-up.
        final: Learning rate at the last step.
        warmup: Number of warm-up steps.
        steps: Number of all steps.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))
