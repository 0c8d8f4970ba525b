"""A third opinion: GPT-2 and its sampling rules in plain NumPy, written for clarity, in float64.

Weights are in the huggingface format, of any float or complex dtype: with a complex step
(Squire & Trapp 1998) the same code yields directional derivatives to rounding error.
"""

import numpy as np


def logits(config, weights, tokens):
    """tokens int [B, T] -> [B, T, V]"""
    w = weights
    T = tokens.shape[1]
    x = w["wte.weight"][tokens] + w["wpe.weight"][:T]  # [B, T, D]
    for layer in range(config.n_layer):
        p = f"h.{layer}."
        x = x + attention(config, w, p + "attn.", layer_norm(x, w[p + "ln_1.weight"], w[p + "ln_1.bias"]))
        x = x + mlp(w, p + "mlp.", layer_norm(x, w[p + "ln_2.weight"], w[p + "ln_2.bias"]))
    x = layer_norm(x, w["ln_f.weight"], w["ln_f.bias"])
    return x @ w.get("lm_head.weight", w["wte.weight"]).T


def layer_norm(x, scale, shift):
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + 1e-5) * scale + shift


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def mlp(w, p, x):
    return gelu(x @ w[p + "c_fc.weight"] + w[p + "c_fc.bias"]) @ w[p + "c_proj.weight"] + w[p + "c_proj.bias"]


def attention(config, w, p, x):
    B, T, D = x.shape
    qkv = x @ w[p + "c_attn.weight"] + w.get(p + "c_attn.bias", 0)
    q, k, v = (a.reshape(B, T, config.n_head, -1).transpose(0, 2, 1, 3) for a in np.split(qkv, 3, axis=-1))
    scores = q @ k.transpose(0, 1, 3, 2) / np.sqrt(D // config.n_head)  # [B, N, T, S]
    visible = np.tril(np.ones((T, T), bool))
    weights = np.where(visible, np.exp(scores - scores.real.max(-1, keepdims=True)), 0)
    pattern = weights / weights.sum(-1, keepdims=True)
    z = (pattern @ v).transpose(0, 2, 1, 3).reshape(B, T, D)
    return z @ w[p + "c_proj.weight"] + w[p + "c_proj.bias"]


def loss(config, weights, inputs, targets):
    """Mean cross-entropy in nats over the targets that are not negative."""
    z = logits(config, weights, inputs)
    top = z.real.max(-1, keepdims=True)
    log_total = np.log(np.exp(z - top).sum(-1)) + top[..., 0]
    chosen = np.take_along_axis(z, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return (log_total - chosen)[targets >= 0].mean()


def directional_derivative(config, weights, inputs, targets, name, direction):
    """d loss / d weights[name] along `direction`, by a complex step."""
    step = 1e-30
    moved = {**weights, name: weights[name] + 1j * step * direction}
    return loss(config, moved, inputs, targets).imag / step


def adamw(settings, decayed, weights, gradients, moments, step, lr):
    """One AdamW step (Loshchilov & Hutter 2019, algorithm 2) behind a global-norm clip -> the new weights.

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
    """One row of logits [V] -> probabilities [V], zero where dropped, by the rules of parity/sampling.py."""
    logits = logits.astype(np.float64)
    for token in set(seen) if repetition_penalty is not None else ():
        logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
    if temperature == 0:
        return np.arange(len(logits)) == logits.argmax()
    logits = logits / temperature
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
    """One row of logits [V] and one uniform -> token id."""
    probs = keep(logits, seen, **options)
    cdf = probs.cumsum()
    beyond = np.flatnonzero((cdf > u * cdf[-1]) & (probs > 0))
    return int(beyond[0] if len(beyond) else np.flatnonzero(probs)[-1])
