"""The oracle of the tests, in plain NumPy and float64: the model of parity/reference.py, AdamW and sampling."""

import numpy as np

from parity.reference import attention, directional_derivative, gelu, layer_norm, logits, loss, mlp

__all__ = [
    "attention",
    "directional_derivative",
    "gelu",
    "layer_norm",
    "logits",
    "loss",
    "mlp",
]  # and the functions below


def adamw(settings, decayed, weights, gradients, moments, step, lr):
    """Clip by the global norm, make one AdamW step (Loshchilov & Hutter 2019, algorithm 2), return the new weights.

    `moments` {name: [m, v]} are changed in place; `step` counts from 1.
    """
    norm = np.sqrt(sum((g**2).sum() for g in gradients.values()))
    clip = min(1, settings.clip / norm)
    new = {}
    for name, g in gradients.items():
        m, v = moments.setdefault(name, [0, 0])
        m = settings.beta1 * m + (1 - settings.beta1) * clip * g
        v = settings.beta2 * v + (1 - settings.beta2) * (clip * g) ** 2
        moments[name] = [m, v]
        update = m / (1 - settings.beta1**step) / (np.sqrt(v / (1 - settings.beta2**step)) + settings.eps)
        new[name] = weights[name] - lr * (update + settings.weight_decay * (name in decayed) * weights[name])
    return new


def keep(logits, seen=(), temperature=1.0, top_k=None, top_p=None, min_p=None, repetition_penalty=None):
    """Return the probabilities [V] of one row of logits [V] by the rules of parity/sampling.py; 0 where dropped."""
    logits = logits.astype(np.float64)
    for token in set(seen) if repetition_penalty is not None else ():
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    if temperature == 0:
        return np.arange(len(logits)) == logits.argmax()
    logits = (logits - logits.max()) / temperature
    if top_k is not None:
        logits = np.where(logits < np.sort(logits)[-top_k], -np.inf, logits)
    probs = np.exp(logits - logits.max())
    probs /= probs.sum()
    largest = probs.max()
    if top_p is not None:
        ordered = np.sort(probs)[::-1]
        last = ordered[np.flatnonzero(np.cumsum(ordered) - ordered < top_p)[-1]]
        probs = np.where(probs < last, 0, probs)
    if min_p is not None:
        probs = np.where(probs < min_p * largest, 0, probs)
    return probs


def choose(logits, u, seen=(), **options):
    """Choose a token id from one row of logits [V] and one uniform."""
    probs = keep(logits, seen, **options)
    cdf = probs.cumsum()
    beyond = np.flatnonzero((cdf > u * cdf[-1]) & (probs > 0))
    return int(beyond[0] if len(beyond) else np.flatnonzero(probs)[-1])
