"""GPT-2 in plain NumPy, in float64: the truth that both backends are measured against.

Weights are in the huggingface format, of any float or complex dtype: with a complex step (Squire & Trapp
1998) the same code yields directional derivatives to rounding error. Written for clarity and, with one layer's
weights widened at a time, for little memory. Sources: as in gpt_torch/model.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from parity import taps
from parity.config import LAYER_NORM_EPS, GPTConfig, is_counted
from parity.taps import tap

Weights = Mapping[str, np.ndarray]  # in the huggingface format


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Any = None) -> np.ndarray:
    """tokens int [B, T] -> [B, T, V], in float64 or complex128 whatever `compute` says."""
    T = tokens.shape[1]
    x = tap("embed", wide(weights["wte.weight"][tokens]) + wide(weights["wpe.weight"][:T]))  # [B, T, D]
    for number in range(config.n_layer):
        taps.layer(number)
        prefix = f"h.{number}."
        block = {name.removeprefix(prefix): wide(weights[name]) for name in weights if name.startswith(prefix)}
        ln_1 = tap("ln_1", layer_norm(x, block["ln_1.weight"], block["ln_1.bias"]))
        x = tap("resid_mid", x + attention(config, block, "attn.", ln_1))
        ln_2 = tap("ln_2", layer_norm(x, block["ln_2.weight"], block["ln_2.bias"]))
        x = tap("resid_post", x + mlp(block, "mlp.", ln_2))
    taps.layer(None)
    x = tap("ln_f", layer_norm(x, wide(weights["ln_f.weight"]), wide(weights["ln_f.bias"])))
    return tap("logits", x @ wide(weights.get("lm_head.weight", weights["wte.weight"])).T)


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Any = None,
) -> dict[str, np.ndarray]:
    """{name of parity/taps.py: activation}, in float64."""
    with taps.probe(config, names) as cache:
        logits(config, weights, tokens)
    return cache


def wide(array: np.ndarray) -> np.ndarray:
    return array.astype(np.promote_types(array.dtype, np.float64), copy=False)


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + LAYER_NORM_EPS) * scale + shift


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def mlp(w: Weights, p: str, x: np.ndarray) -> np.ndarray:
    pre = tap("mlp.pre", x @ w[p + "c_fc.weight"] + w[p + "c_fc.bias"])  # [B, T, F]
    return tap("mlp.out", tap("mlp.post", gelu(pre)) @ w[p + "c_proj.weight"] + w[p + "c_proj.bias"])


def attention(config: GPTConfig, w: Weights, p: str, x: np.ndarray) -> np.ndarray:
    B, T, D = x.shape
    qkv = x @ w[p + "c_attn.weight"] + w.get(p + "c_attn.bias", np.zeros(1))
    q, k, v = (part.reshape(B, T, config.n_head, -1) for part in np.split(qkv, 3, axis=-1))
    q, k, v = (tap(f"attn.{n}", a).transpose(0, 2, 1, 3) for n, a in zip("qkv", (q, k, v), strict=True))  # [B, N, T, H]
    scores = tap("attn.scores", q @ k.transpose(0, 1, 3, 2) / np.sqrt(config.head_width))  # [B, N, T, S]
    visible = np.tril(np.ones((T, T), bool))
    raised = np.where(visible, np.exp(np.where(visible, scores - scores.real.max(-1, keepdims=True), 0)), 0)
    pattern = tap("attn.pattern", raised / raised.sum(-1, keepdims=True))
    z = tap("attn.z", (pattern @ v).transpose(0, 2, 1, 3))  # [B, T, N, H]
    return tap("attn.out", z.reshape(B, T, D) @ w[p + "c_proj.weight"] + w[p + "c_proj.bias"])


def loss(config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray) -> Any:
    """Mean cross-entropy in nats per target that counts.

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        inputs: Token ids, int [B, T].
        targets: Token ids, int [B, T]; positions with IGNORE_INDEX or -100 are left out.

    Returns:
        A float64 or complex128 scalar.

    Raises:
        InputError: For any other target outside the vocabulary.
    """
    config.check_targets(targets)
    z = logits(config, weights, inputs)
    top = z.real.max(-1, keepdims=True)
    log_total = np.log(np.exp(z - top).sum(-1)) + top[..., 0]
    target_logits = np.take_along_axis(z, np.maximum(targets, 0)[..., None], -1)[..., 0]
    return (log_total - target_logits)[is_counted(targets)].mean()


def directional_derivative(
    config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray, name: str, direction: np.ndarray
) -> float:
    """d loss / d weights[name] along `direction`, by a complex step."""
    step = 1e-30
    moved = {**weights, name: weights[name] + 1j * step * direction}
    return loss(config, moved, inputs, targets).imag / step
