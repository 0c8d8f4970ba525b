"""LoRA adapters on a GPTModel (Hu et al. 2021); gpt_torch/lora.py is its twin.

parity/weights/adapters.py has the table. The model file does not know adapters: add_lora() replaces linear layers of a
model by layers that have one. The adapters of all layers are stacked like the weights, so that the model scans over
both.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from gpt_jax.arrays import dropout, widened
from gpt_jax.model import GPTModel
from gpt_jax.weights import config_of, copy_arrays, export_arrays, parameters
from parity.errors import InputError
from parity.storage.paths import user_path
from parity.weights import adapters, peft_files
from parity.weights.adapters import AdaptedLinear, LoraConfig, adapted_linears, adapter_rows, initial_adapter


class LoraLinear(nnx.LinearGeneral):
    """A linear layer with an adapter: x [..., in] -> x W + b + scale * dropout(x) A B [..., out].

    Kernel and bias are the parameters of the layer that it replaces, under the same names.
    """

    def __init__(self, linear: nnx.LinearGeneral, adapted: AdaptedLinear, lora: LoraConfig, n_layer: int):
        for name, value in vars(linear).items():
            if not name.startswith("_"):
                setattr(self, name, value)
        self.scale = lora.scale
        self.drop_rate = lora.dropout
        mask = adapted.block_mask  # [C, R]
        self.blocks = None if mask is None else tuple(map(tuple, mask.T.tolist()))
        dtype = linear.kernel[...].dtype
        self.lora_A = nnx.Param(jnp.zeros((n_layer, *linear.in_features, adapted.rank), dtype))  # [L, in, R]
        self.lora_B = nnx.Param(jnp.zeros((n_layer, adapted.rank, *linear.out_features), dtype))  # [L, R, out]
        self.key: Array | None = None  # [L]; see with_dropout()

    def __call__(self, x: Array, out_sharding: Any = None) -> Array:
        h = jnp.tensordot(dropout(x, self.drop_rate, self.key), self.lora_A[...], len(self.in_features))  # [..., R]
        return super().__call__(x, out_sharding) + self.scale * times_B(h, self.masked_B())  # [..., out]

    def masked_B(self) -> Array:
        """B [..., R, out] with zeros outside of its blocks, where it therefore has no gradient."""
        B = self.lora_B[...]
        if self.blocks is None:
            return B
        mask = jnp.asarray(self.blocks, B.dtype)  # [R, C]
        return B * mask.reshape((1,) * (B.ndim - 4) + (*mask.shape, 1, 1))


@jax.custom_vjp
def times_B(h: Array, B: Array) -> Array:
    """h [..., R], B [R, out] -> [..., out].

    JAX's own rule computes the gradient of B with that of the result as first factor, for which XLA for CPUs transposes
    the latter, the larger one. In exchange, jax.jvp does not go through this function.
    """
    return jnp.tensordot(h, B, 1)


def _times_B(h: Array, B: Array) -> tuple[Array, tuple[Array, Array]]:
    return times_B(h, B), (h, B)


def _gradients(factors: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    h, B = factors
    positions = tuple(range(h.ndim - 1))
    out = tuple(range(h.ndim - 1, gradient.ndim))
    h_gradient = jnp.tensordot(gradient, B, (out, tuple(range(1, B.ndim))))  # [..., R]
    return h_gradient, jnp.tensordot(h, gradient, (positions, positions))


times_B.defvjp(_times_B, _gradients)


def add_lora(model: Any, lora: LoraConfig, seed: int = 0) -> None:
    """Give a model adapters.

    The model is changed in place. It computes the same function as before until the adapters are trained, because B
    starts as zero. To train them alone, differentiate with respect to the first result of gpt_jax.trainable.split().

    Args:
        model: A GPTModel without adapters.
        lora: Options of the adapters.
        seed: Seed of the initial values of A, which equal those of gpt_torch with the same seed.

    Raises:
        InputError: If the model has adapters already.
    """
    config = config_of(model)
    parameters(model)  # raises for a DecodingModel
    if lora_config(model) is not None:
        raise InputError("the model has an adapter already; merge it into the weights first")
    for linear in adapted_linears(lora):
        parent, name = _parent(model, linear)
        setattr(parent, name, LoraLinear(getattr(parent, name), linear, lora, config.n_layer))
    model.lora = lora
    _load(model, initial_adapter(config, lora, seed), "adapter")


def lora_config(model: Any) -> LoraConfig | None:
    """Return the options of a model's adapters, or None if it has none."""
    config_of(model)  # raises for another class
    return getattr(model, "lora", None)


def with_dropout(model: GPTModel, key: Array) -> GPTModel:
    """Return a copy of a model whose adapters drop elements of their inputs, by masks drawn from a jax.random key."""
    copy = jax.tree.map(lambda leaf: leaf, model)
    linears = adapted_linears(_require_lora(model))
    for linear, linear_key in zip(linears, jax.random.split(key, len(linears)), strict=True):
        parent, name = _parent(copy, linear)
        getattr(parent, name).key = nnx.data(jax.random.split(linear_key, model.config.n_layer))
    return copy


def export_adapter(model: GPTModel) -> dict[str, Any]:
    """Return the parameters of a model's adapters as NumPy arrays, with peft's names."""
    return export_arrays(model, "huggingface", adapter_rows(_require_lora(model)))


def save_adapter(model: GPTModel, folder: str | Path, base: str | None = None, base_sha256: str | None = None) -> None:
    """Write a model's adapters as adapter_config.json and adapter_model.safetensors, which peft opens.

    Args:
        model: A model with adapters.
        folder: The folder, which is made if it does not exist.
        base: Name of the base for adapter_config.json: a size such as "124M", or a folder with weights.
        base_sha256: Hash of the base's weights (see parity.weights.digest.weights_sha256), which is checked
            wherever the base is found by its name.

    Raises:
        InputError: If the model has no adapters.
        OSError: If the folder cannot be written.
    """
    lora = _require_lora(model)
    adapter = peft_files.Adapter(lora, export_adapter(model), base, base_sha256, str(folder))
    peft_files.write(user_path(folder), model.config, adapter)


def load_adapter(model: GPTModel, folder: str | Path) -> None:
    """Give a model the adapters in a folder of peft, of save_adapter() of either backend, or of a training run.

    Args:
        model: The base, a GPTModel without adapters; it is changed in place.
        folder: The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError: If files are missing or damaged, the adapter has another shape, or its configuration asks for
            something that is not implemented; the message names the key.
    """
    adapter = peft_files.read(user_path(folder))
    adapter.check(config_of(model))
    add_lora(model, adapter.lora)
    _load(model, adapter.arrays, adapter.origin)


def merge(model: GPTModel) -> GPTModel:
    """Return a copy of a model with its adapters added to the weights, W + scale * A B, and removed.

    The sum is computed in float32 (float64 if the model has it) and then rounded to the dtype of the parameters, where
    a small adapter can be lost in 16 bits: merge before cast(). The model itself keeps its weights and its adapters.

    Args:
        model: A model with adapters.

    Raises:
        InputError: If the model has no adapters.
    """
    lora = _require_lora(model)
    result = jax.tree.map(lambda leaf: leaf, model)
    plain = nnx.eval_shape(lambda: GPTModel(model.config, seed=None))  # has linear layers without adapters
    for linear in adapted_linears(lora):
        parent, name = _parent(result, linear)
        adapted, replacement = getattr(parent, name), getattr(*_parent(plain, linear))
        replacement.kernel = nnx.Param(_merged_kernel(adapted))
        replacement.bias = adapted.bias
        setattr(parent, name, replacement)
    del result.lora
    return result


def _merged_kernel(linear: LoraLinear) -> Array:
    kernel = linear.kernel[...]  # [L, in, out]
    wide = widened(kernel.dtype)
    A, B = linear.lora_A[...].astype(wide), linear.masked_B().astype(wide)
    flat_A, flat_B = A.reshape(len(A), -1, A.shape[-1]), B.reshape(*B.shape[:2], -1)  # [L, in, R], [L, R, out]
    product = jnp.einsum("LIR,LRO->LIO", flat_A, flat_B, precision="highest").reshape(kernel.shape)
    return (kernel.astype(wide) + linear.scale * product).astype(kernel.dtype)


def _parent(model: Any, linear: AdaptedLinear) -> tuple[Any, str]:
    """Return the module that holds a linear layer, and the layer's name in it."""
    *path, name = linear.path("flax").split(".")
    for part in path:
        model = getattr(model, part)
    return model, name


def _require_lora(model: Any) -> LoraConfig:
    lora = lora_config(model)
    if lora is None:
        raise InputError("the model has no adapter; give it one with add_lora() or load_adapter()")
    return lora


def _load(model: GPTModel, arrays: Mapping[str, Any], origin: str) -> None:
    copy_arrays(model, arrays, "huggingface", origin, adapters.adapter_rows(_require_lora(model)))
