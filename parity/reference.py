"""GPT-2 in plain NumPy and float64: the reference against which both backends are measured.

Weights are in the huggingface format, of any float or complex dtype. With complex weights the same code computes
directional derivatives by a complex step (Squire & Trapp 1998), accurate to rounding error. To save memory, weights are
converted to float64 one layer at a time. Sources: as in gpt_torch/model.py.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from parity import taps
from parity.arrays import as_numpy
from parity.config import LAYER_NORM_EPS, GPTConfig, is_counted
from parity.taps import tap

Weights = Mapping[str, np.ndarray]
"""{name: array} in the huggingface format."""


def logits(config: GPTConfig, weights: Weights, tokens: np.ndarray, compute: Any = None) -> np.ndarray:
    """Run the model.

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        tokens: Token ids, int [B, T].
        compute: Has no effect; the implementations that are compared have such an argument (dtype and device).

    Returns:
        Logits [B, T, V], float64, or complex128 if a weight is complex.
    """
    T = tokens.shape[1]
    x = as_float64(weights["wte.weight"][tokens]) + as_float64(weights["wpe.weight"][:T])
    x = tap("embed", x)  # [B, T, D]
    for number in range(config.n_layer):
        taps.layer(number)
        prefix = f"h.{number}."
        block = {name.removeprefix(prefix): as_float64(weights[name]) for name in weights if name.startswith(prefix)}
        h = tap("ln_1", layer_norm(x, block["ln_1.weight"], block["ln_1.bias"]))
        x = tap("resid_mid", x + attention(config, block, "attn.", h))
        h = tap("ln_2", layer_norm(x, block["ln_2.weight"], block["ln_2.bias"]))
        x = tap("resid_post", x + mlp(block, "mlp.", h))
    taps.layer(None)
    x = tap("ln_f", layer_norm(x, as_float64(weights["ln_f.weight"]), as_float64(weights["ln_f.bias"])))
    return tap("logits", x @ output_head(weights).T)


def activations(
    config: GPTConfig,
    weights: Weights,
    tokens: np.ndarray,
    names: Iterable[str] | None = None,
    compute: Any = None,
) -> dict[str, np.ndarray]:
    """Run the model and record its activations.

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        tokens: Token ids, int [B, T].
        names: Names or patterns of parity/taps; by default all.
        compute: Has no effect, as in `logits`.

    Returns:
        {name: activation}, in float64.

    Raises:
        InputError: For names that the model does not have.
    """
    with taps.probe(config, names) as cache:
        logits(config, weights, tokens)
    return cache


def as_float64(array: np.ndarray) -> np.ndarray:
    """Convert to float64, or to complex128 if the array is complex."""
    array = as_numpy(array)
    return array.astype(np.promote_types(array.dtype, np.float64), copy=False)


def output_head(weights: Weights) -> np.ndarray:
    """The matrix of the output head [V, D] in float64; a tied one is the token embedding."""
    return as_float64(weights.get("lm_head.weight", weights["wte.weight"]))


def layer_norm(x: np.ndarray, scale: np.ndarray, shift: np.ndarray) -> np.ndarray:
    """LayerNorm over the last axis: x [..., D] -> [..., D]."""
    mean = x.mean(-1, keepdims=True)
    var = ((x - mean) ** 2).mean(-1, keepdims=True)
    return (x - mean) / np.sqrt(var + LAYER_NORM_EPS) * scale + shift


def gelu(x: np.ndarray) -> np.ndarray:
    """GELU in its tanh form."""
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x * x * x)))


def mlp(weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """The MLP of a layer whose weights have names with `prefix`: x [B, T, D] -> [B, T, D]."""
    x = tap("mlp.pre", x @ weights[prefix + "c_fc.weight"] + weights[prefix + "c_fc.bias"])  # [B, T, F]
    x = tap("mlp.post", gelu(x))  # [B, T, F]
    return tap("mlp.out", x @ weights[prefix + "c_proj.weight"] + weights[prefix + "c_proj.bias"])


def attention(config: GPTConfig, weights: Weights, prefix: str, x: np.ndarray) -> np.ndarray:
    """The attention of a layer whose weights have names with `prefix`: x [B, T, D] -> [B, T, D]."""
    B, T, D = x.shape
    qkv = x @ weights[prefix + "c_attn.weight"] + weights.get(prefix + "c_attn.bias", np.zeros(1))
    q, k, v = (part.reshape(B, T, config.n_head, -1) for part in np.split(qkv, 3, axis=-1))
    q, k, v = tap("attn.q", q), tap("attn.k", k), tap("attn.v", v)  # each [B, T, N, H]
    q, k, v = (part.transpose(0, 2, 1, 3) for part in (q, k, v))  # each [B, N, T, H]
    scores = tap("attn.scores", q @ k.transpose(0, 1, 3, 2) / np.sqrt(config.head_width))  # [B, N, T, S]
    mask = np.tril(np.ones((T, T), bool))  # [T, S]
    largest = scores.real.max(-1, keepdims=True)
    exponentials = np.where(mask, np.exp(np.where(mask, scores - largest, 0)), 0)
    pattern = tap("attn.pattern", exponentials / exponentials.sum(-1, keepdims=True))
    z = tap("attn.z", (pattern @ v).transpose(0, 2, 1, 3))  # [B, T, N, H]
    return tap("attn.out", z.reshape(B, T, D) @ weights[prefix + "c_proj.weight"] + weights[prefix + "c_proj.bias"])


def loss(config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray) -> Any:
    """Mean cross-entropy in nats per target that counts.

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        inputs: Token ids, int [B, T].
        targets: Token ids, int [B, T]; positions with IGNORE_INDEX or -100 do not count.

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
    """Return the derivative of the loss along a direction in one parameter, by a complex step.

    Args:
        config: Configuration of the model.
        weights: Weights in the huggingface format.
        inputs: Token ids, int [B, T].
        targets: Token ids, int [B, T], as in `loss`.
        name: Name of the parameter.
        direction: Direction, of the parameter's shape.
    """
    step = 1e-30
    shifted = {**weights, name: weights[name] + 1j * step * direction}
    return loss(config, shifted, inputs, targets).imag / step
