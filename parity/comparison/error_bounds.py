"""How far rounding may carry a result: a bound for each named activation, derived, not guessed.

Model of one operation. A sum of n products in precision u (the unit roundoff) makes a rounding error at each
partial sum; taken as independent and of standard deviation u/sqrt(3) of the partial sum, which itself grows as
a random walk, they add up to u * sqrt(n / 6) of the result's root mean square (Higham & Mary 2019 derive the
sqrt(n) law; the constant is that of the random walk). Functions of one element (GELU, softmax, LayerNorm's
scaling) round a few times: 2u of the element. n of each activation is in REDUCTIONS, of its
gradient in REDUCTIONS_BACK. In 16 bit, sums are made in float32, and u is that of storing the result.

Accumulation. Such an error enters at every activation of parity/reference.py, in float64, and the network
itself carries it on: so the amplification by sharp attention or a small variance is the real one, not a
product of norms. The bound of an activation is SAFETY times the largest deviation seen in a few such runs.
Order of summation does not matter to it; blocked sums err less than this and stay well below.
"""

import dataclasses
import math
from collections.abc import Callable

import numpy as np

from parity import reference, taps
from parity.comparison.protocol import Weights
from parity.config import GPTConfig

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}
SAFETY = 4.0
"""Two implementations, and the largest of a few runs against the largest of another sequence of errors."""
N_RUNS = 2
# Axes that an activation is summed over; the others are made element by element.
REDUCTIONS = {
    "attn.q": "D", "attn.k": "D", "attn.v": "D", "attn.scores": "H", "attn.z": "S", "attn.out": "D",
    "mlp.pre": "D", "mlp.out": "F", "logits": "D",
}  # fmt: skip
# The same for the gradient with respect to it.
REDUCTIONS_BACK = {
    "ln_f": "V", "mlp.post": "D", "ln_2": "F", "attn.z": "D", "ln_1": "C D",
    "attn.pattern": "H", "attn.q": "S", "attn.k": "S", "attn.v": "S",
}  # fmt: skip


def rounded(weights: Weights, dtype: str) -> dict[str, np.ndarray]:
    """Weights that a model in `dtype` holds exactly: in float32 where it is bfloat16, which NumPy has not."""
    if dtype != "bfloat16":
        return {name: np.asarray(array, dtype) for name, array in weights.items()}
    return {name: _to_bfloat16(np.asarray(array, np.float32)) for name, array in weights.items()}


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    """The nearest number with the upper 16 bits of a float32, ties to even."""
    bits = x.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32)


@dataclasses.dataclass(frozen=True)
class Rounding:
    """The rounding errors that making one activation adds to it, and making its cotangent to that."""

    generator: np.random.Generator
    summing: float
    """Standard deviation, relative to the root mean square along the last axis"""
    summing_back: float
    element: float
    """Standard deviation, relative to each element"""

    def __call__(self, x: np.ndarray) -> np.ndarray:
        return self._add(x, self.summing)

    def backward(self, cotangent: np.ndarray) -> np.ndarray:
        return self._add(cotangent, self.summing_back)

    def _add(self, x: np.ndarray, summing: float) -> np.ndarray:
        size = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
        return x + self.generator.standard_normal(x.shape) * (summing * size + self.element * np.abs(x))


def noise(config: GPTConfig, dtype: str, T: int, seed: int) -> dict[str, Rounding]:
    """Patches that add to each activation the rounding errors of its own operation."""
    u = UNIT_ROUNDOFF[dtype]
    generator = np.random.default_rng(seed)
    return {
        name: Rounding(
            generator,
            sum_rounding(dtype, reduction_length(REDUCTIONS, name, config, T)),
            sum_rounding(dtype, reduction_length(REDUCTIONS_BACK, name, config, T)),
            2 * u,
        )
        for name in taps.activation_names(config)
    }


def sum_rounding(dtype: str, n: int) -> float:
    """Rounding of a sum of n products, relative to its root mean square; in 16 bit it is made in float32."""
    return UNIT_ROUNDOFF["float32" if dtype == "bfloat16" else dtype] * math.sqrt(n / 6)


def reduction_length(reductions: dict[str, str], name: str, config: GPTConfig, T: int) -> int:
    """How many products an activation, or its cotangent, is a sum of; 0 for what is made element by element."""
    axes = reductions.get(name.split(".", 2)[-1] if name.startswith("blocks.") else name, "")
    return math.prod({**config.axes, "S": T}[axis] for axis in axes.split()) if axes else 0


def propagated_errors(
    config: GPTConfig, dtype: str, T: int, truth: Callable[[dict], dict[str, np.ndarray]]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """(what truth({}) gives, {name: bound on the largest error in it}).

    `truth(patches)`: named arrays, computed in float64 with these patches at the activations.
    """
    exact = truth({})
    bounds = dict.fromkeys(exact, 0.0)
    for seed in range(N_RUNS):
        for name, array in truth(noise(config, dtype, T, seed)).items():
            bounds[name] = max(bounds[name], SAFETY * float(np.abs(array - exact[name]).max()))
    return exact, bounds


def activation_bounds(
    config: GPTConfig, weights: Weights, tokens: np.ndarray, dtype: str, names: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """({name: activation in float64}, {name: bound})."""

    def truth(patches: dict) -> dict[str, np.ndarray]:
        with taps.probe(config, names, patches) as cache:
            reference.logits(config, weights, tokens)
        return cache

    return propagated_errors(config, dtype, tokens.shape[1], truth)
