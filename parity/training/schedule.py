"""Learning rate of a step, computed on the host and handed to either backend."""

import math


def learning_rate(step: int, peak: float, final: float, warmup: int, steps: int) -> float:
    """Linear warm-up to `peak` over `warmup` steps, then half a cosine down to `final` at the last step.

    `step` counts from 0. Source: Loshchilov & Hutter 2017 (SGDR), without restarts, as in nanoGPT.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, steps - 1 - warmup))
    return final + 0.5 * (peak - final) * (1 + math.cos(math.pi * progress))
