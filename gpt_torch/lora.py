"""LoRA adapters on a GPTModel (Hu et al. 2021); gpt_jax/lora.py is its twin.

parity/weights/adapters.py has the table. The model file does not know adapters: add_lora() replaces linear layers of a
model by layers that have one.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gpt_torch.model import GPTModel, cast
from gpt_torch.modes import require_values, unwrap
from gpt_torch.weights import copy_arrays, export_arrays
from parity.errors import InputError
from parity.storage.paths import user_path
from parity.weights import adapters, peft_files
from parity.weights.adapters import AdaptedLinear, LoraConfig, adapted_linears, adapter_rows, initial_adapter


class LoraLinear(nn.Linear):
    """A linear layer with an adapter: x [..., in] -> x W + b + scale * dropout(x) A B [..., out].

    Weight and bias are the tensors of the layer that it replaces, under the same names.
    """

    blocks: Tensor | None

    def __init__(self, linear: nn.Linear, adapted: AdaptedLinear, lora: LoraConfig):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = lora.scale
        self.drop_rate = lora.dropout
        self.lora_A = nn.Parameter(linear.weight.new_zeros(adapted.rank, linear.in_features))  # [R, in]
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, adapted.rank))  # [out, R]
        mask = adapted.block_mask
        blocks = None if mask is None else torch.from_numpy(mask).to(linear.weight.device)  # [C, R]
        self.register_buffer("blocks", blocks, persistent=False)
        self.training = linear.training

    def forward(self, x: Tensor) -> Tensor:
        h = F.linear(F.dropout(x, self.drop_rate, self.training), self.lora_A)  # [..., R]
        return super().forward(x) + self.scale * F.linear(h, self.masked_B())  # [..., out]

    def masked_B(self) -> Tensor:
        """B with zeros outside of its blocks, where it therefore has no gradient."""
        if self.blocks is None:
            return self.lora_B
        return (self.lora_B.unflatten(0, (3, -1)) * self.blocks[:, None]).flatten(0, 1)


def add_lora(model: nn.Module, lora: LoraConfig, seed: int = 0) -> None:
    """Give a model adapters, and freeze everything else.

    The model is changed in place. It computes the same function as before until the adapters are trained, because B
    starts as zero. Its other parameters no longer require gradients.

    Args:
        model: A GPTModel without adapters.
        lora: Options of the adapters.
        seed: Seed of the initial values of A, which equal those of gpt_jax with the same seed.

    Raises:
        InputError: If the model has adapters already.
    """
    gpt = unwrap(model)
    require_values(gpt)
    if lora_config(gpt) is not None:
        raise InputError("the model has an adapter already; merge it into the weights first")
    gpt.requires_grad_(False)
    for linear in adapted_linears(lora):
        for layer in range(gpt.config.n_layer):
            parent, _, name = linear.path("torch").format(layer).rpartition(".")
            module = gpt.get_submodule(parent)
            setattr(module, name, LoraLinear(getattr(module, name), linear, lora))
    gpt.lora = lora
    _load(gpt, initial_adapter(gpt.config, lora, seed), "adapter")


def lora_config(model: nn.Module) -> LoraConfig | None:
    """Return the options of a model's adapters, or None if it has none."""
    return getattr(unwrap(model), "lora", None)


def export_adapter(model: nn.Module) -> dict[str, Any]:
    """Return the parameters of a model's adapters as NumPy arrays, with peft's names."""
    return export_arrays(unwrap(model), "huggingface", adapter_rows(_require_lora(model)))


def save_adapter(model: nn.Module, folder: str | Path, base: str | None = None, base_sha256: str | None = None) -> None:
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
    gpt, lora = unwrap(model), _require_lora(model)
    adapter = peft_files.Adapter(lora, export_adapter(gpt), base, base_sha256, str(folder))
    peft_files.write(user_path(folder), gpt.config, adapter)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Give a model the adapters in a folder of peft, of save_adapter() of either backend, or of a training run.

    Args:
        model: The base, a GPTModel without adapters; it is changed in place.
        folder: The folder with adapter_config.json and adapter_model.safetensors.

    Raises:
        InputError: If files are missing or damaged, the adapter has another shape, or its configuration asks for
            something that is not implemented; the message names the key.
    """
    adapter = peft_files.read(user_path(folder))
    gpt = unwrap(model)
    adapter.check(gpt.config)
    add_lora(gpt, adapter.lora)
    _load(gpt, adapter.arrays, adapter.origin)


def merge(model: nn.Module) -> GPTModel:
    """Return a copy of a model with its adapters added to the weights, W + scale * B A, and removed.

    The sum is computed in float32 (float64 if the model has it) and then rounded to the dtype of the parameters, where
    a small adapter can be lost in 16 bits: merge before cast(). The model itself keeps its weights and its adapters.

    Args:
        model: A model with adapters.

    Raises:
        InputError: If the model has no adapters.
    """
    gpt, lora = unwrap(model), _require_lora(model)
    result = cast(gpt, gpt.tok_emb.weight.dtype)
    for linear in adapted_linears(lora):
        for layer in range(gpt.config.n_layer):
            parent, _, name = linear.path("torch").format(layer).rpartition(".")
            module = result.get_submodule(parent)
            setattr(module, name, _merged(getattr(module, name)))
    del result.lora
    return result.requires_grad_(True)


def _merged(linear: LoraLinear) -> nn.Linear:
    merged = nn.Linear(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
    with torch.no_grad():
        wide = torch.promote_types(linear.weight.dtype, torch.float32)
        product = linear.masked_B().to(wide) @ linear.lora_A.to(wide)
        total = linear.weight.to(wide) + linear.scale * product
        merged.weight = nn.Parameter(total.to(linear.weight.dtype))
    merged.bias = linear.bias
    return merged


def _require_lora(model: nn.Module) -> LoraConfig:
    lora = lora_config(model)
    if lora is None:
        raise InputError("the model has no adapter; give it one with add_lora() or load_adapter()")
    return lora


def _load(gpt: GPTModel, arrays: Mapping[str, Any], origin: str) -> None:
    copy_arrays(gpt, arrays, "huggingface", origin, adapters.adapter_rows(_require_lora(gpt)))
