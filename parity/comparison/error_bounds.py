"""Error bounds: how far rounding alone may move each activation and gradient, derived from the dtype.

Model of one operation. A sum of n products, computed with unit roundoff u, makes a rounding error at each
partial sum. If these errors are independent with standard deviation u/sqrt(3) of the partial sum, and the
partial sums grow as a random walk does, the error of the result is u * sqrt(n / 6) of its root mean square.
(Higham & Mary 2019, "A new approach to probabilistic rounding error analysis", derive the sqrt(n) law; the
constant is that of the random walk.) Elementwise functions (GELU, softmax, the scaling of LayerNorm) round a
few times: 2u of each element. REDUCTIONS and REDUCTIONS_BACK give n for each activation and its gradient. In
bfloat16, sums are accumulated in float32, and u of bfloat16 applies to storing the result.

Propagation. Random errors of this size are added to every activation of the float64 reference, and the network
propagates them. The amplification by sharp attention or by a small variance is therefore the actual one,
not a product of norms. The bound of an activation is SAFETY times the largest deviation of N_RUNS such runs.
The bound holds for any order of summation; blocked sums have smaller errors.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping

import ml_dtypes
import numpy as np

from parity import reference, taps
from parity.comparison.protocol import Weights
from parity.config import GPTConfig

UNIT_ROUNDOFF = {"float64": 2.0**-53, "float32": 2.0**-24, "bfloat16": 2.0**-9}
SAFETY = 4.0
"""Factor from the largest deviation of a few random runs to the bound on the deviation of an implementation."""
N_RUNS = 2
# The axes that each activation is a sum over; activations that are not listed are computed elementwise.
REDUCTIONS = {
    "attn.q": "D", "attn.k": "D", "attn.v": "D", "attn.scores": "H", "attn.z": "S", "attn.out": "D",
    "mlp.pre": "D", "mlp.out": "F", "logits": "D",
}  # fmt: skip
# The same for the gradient with respect to each activation.
REDUCTIONS_BACK = {
    "ln_f": "V", "mlp.post": "D", "ln_2": "F", "attn.z": "D", "ln_1": "C D",
    "attn.pattern": "H", "attn.q": "S", "attn.k": "S", "attn.v": "S",
}  # fmt: skip

Bounds = tuple[dict[str, np.ndarray], dict[str, float]]
"""({name: exact value in float64}, {name: bound on the absolute error of any element})."""


def rounded(weights: Weights, dtype: str) -> dict[str, np.ndarray]:
    """Round weights to the values that a model in `dtype` holds; for bfloat16 they are returned as float32."""
    if dtype != "bfloat16":
        return {name: np.asarray(array, dtype) for name, array in weights.items()}
    return {
        name: np.asarray(array, np.float32).astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, array in weights.items()
    }


@dataclasses.dataclass(frozen=True)
class Rounding:
    """Random rounding errors of one activation, and of the gradient with respect to it."""

    generator: np.random.Generator
    sum_error: float
    """Standard deviation of the activation's error, relative to the root mean square along the last axis."""
    sum_error_back: float
    """The same for the gradient."""
    element_error: float
    """Standard deviation relative to each element."""

    def forward(self, x: np.ndarray) -> np.ndarray:
        """Add rounding errors to an activation."""
        return self._add(x, self.sum_error)

    def backward(self, gradient: np.ndarray) -> np.ndarray:
        """Add rounding errors to the gradient with respect to the activation."""
        return self._add(gradient, self.sum_error_back)

    def _add(self, x: np.ndarray, sum_error: float) -> np.ndarray:
        rms = np.sqrt(np.mean(np.square(x), axis=-1, keepdims=True))
        return x + self.generator.standard_normal(x.shape) * (sum_error * rms + self.element_error * np.abs(x))


def rounding_noise(config: GPTConfig, dtype: str, T: int, seed: int) -> dict[str, Rounding]:
    """Return the rounding errors of every activation of a model that computes in `dtype` on T positions."""
    generator = np.random.default_rng(seed)
    return {
        name: Rounding(
            generator,
            sum_rounding(dtype, reduction_length(REDUCTIONS, name, config, T)),
            sum_rounding(dtype, reduction_length(REDUCTIONS_BACK, name, config, T)),
            2 * UNIT_ROUNDOFF[dtype],
        )
        for name in taps.activation_names(config)
    }


def sum_rounding(dtype: str, n: int) -> float:
    """Return the rounding error of a sum of n products relative to its root mean square; bfloat16 sums in float32."""
    return UNIT_ROUNDOFF["float32" if dtype == "bfloat16" else dtype] * math.sqrt(n / 6)


def reduction_length(reductions: Mapping[str, str], name: str, config: GPTConfig, T: int) -> int:
    """Return how many products each element of an activation, or of its gradient, sums; 0 if it is elementwise."""
    axes = reductions.get(name.split(".", 2)[-1] if name.startswith("blocks.") else name, "")
    return math.prod({**config.axes, "S": T}[axis] for axis in axes.split()) if axes else 0


def propagated_errors(
    config: GPTConfig, dtype: str, T: int, compute: Callable[[dict[str, Rounding]], dict[str, np.ndarray]]
) -> Bounds:
    """Bound the errors of named results by computing them with random rounding errors added.

    Args:
        config: Configuration of the model.
        dtype: The dtype whose rounding is modelled.
        T: Number of positions.
        compute: Called with {activation name: rounding errors to add}, which is empty for the exact run;
            returns the results by name, computed in float64.

    Returns:
        The exact results and the bound on the absolute error of each.
    """
    exact = compute({})
    bounds = dict.fromkeys(exact, 0.0)
    for seed in range(N_RUNS):
        for name, array in compute(rounding_noise(config, dtype, T, seed)).items():
            bounds[name] = max(bounds[name], SAFETY * float(np.abs(array - exact[name]).max()))
    return exact, bounds


def activation_bounds(config: GPTConfig, weights: Weights, tokens: np.ndarray, dtype: str, names: list[str]) -> Bounds:
    """Compute named activations of tokens int [B, T] in float64, and their error bounds in `dtype`."""

    def compute(noise: dict[str, Rounding]) -> dict[str, np.ndarray]:
        with taps.probe(config, names, {name: rounding.forward for name, rounding in noise.items()}) as cache:
            reference.logits(config, weights, tokens)
        return cache

    return propagated_errors(config, dtype, tokens.shape[1], compute)
