"""The table of all parameters: their names, axes and orientation in every format, by which conversion.py converts.

    openai       OpenAI's TensorFlow checkpoint: variables start with `model/`, matrices are [1, in, out].
    huggingface  transformers' GPT2LMHeadModel without the prefix `transformer.`: matrices are [in, out].
    torch        The state dict of gpt_torch.GPTModel: matrices are [out, in], as nn.Linear keeps them.
    flax         The parameter paths of gpt_jax.GPTModel: heads are axes of their own, and layers are stacked.

Axes are einops patterns over the letters of parity.config. The table states the orientation of every tensor, so
that a square matrix converts as safely as any other.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError, printable

_DTYPES = tuple(np.dtype(dtype) for dtype in (np.float64, np.float32, np.float16, ml_dtypes.bfloat16))


@dataclasses.dataclass(frozen=True)
class Format:
    """How a format lays out the tensors of a model."""

    name: str
    """Name of the format."""
    stacked: bool = False
    """Whether the tensors of all layers are stacked in one, with the layer axis L in front."""


FORMATS = {format.name: format for format in (
    Format("openai"), Format("huggingface"), Format("torch"), Format("flax", stacked=True),
)}  # fmt: skip
"""All formats by name."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter of the model, or the same parameter of every layer.

    In a name, `{}` stands for the number of the layer; None means that the format cannot hold the parameter.
    """

    openai: str | None
    """Name in OpenAI's checkpoints."""
    huggingface: str
    """Name in the files of transformers, without the prefix `transformer.`."""
    torch: str
    """Name in the state dict of gpt_torch.GPTModel."""
    flax: str
    """Path in gpt_jax.GPTModel."""
    axes: Mapping[str, str]
    """{format: einops pattern of one layer's tensor}."""
    init: str
    """Initial value: normal, residual (normal, scaled down by depth), position, zeros or ones; lora_A and lora_B for
    the two matrices of an adapter."""
    sizes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """{axis letter: size} of axes that the model's configuration does not determine, such as the rank R."""
    layers: tuple[int, ...] | None = None
    """The layers that a part of a model has this parameter of; None stands for all."""

    def name(self, format: str) -> str | None:
        """Return the name in a format, with `{}` for the layer.

        Args:
            format: The format, one of FORMATS.

        Returns:
            The name, or None if the format cannot hold the parameter.
        """
        return getattr(self, format)

    def names(self, format: str, config: GPTConfig) -> list[str]:
        """Return the names of all tensors of this row in a format.

        Args:
            format: The format, one of FORMATS.
            config: Configuration of the model.

        Raises:
            InputError: If the format cannot hold the parameter: OpenAI's has no untied head.
        """
        name = self.name(format)
        if name is None:
            raise InputError(f"the {format} format has no place for {self.huggingface}; use tied_head=True")
        if self.stacked(format) or not self.per_layer:
            return [name]
        return [name.format(layer) for layer in self.layer_numbers(config)]

    def layer_numbers(self, config: GPTConfig) -> Sequence[int]:
        """Return the numbers of the layers that have this parameter.

        Args:
            config: Configuration of the model.
        """
        return range(config.n_layer) if self.layers is None else self.layers

    def shape(self, format: str, config: GPTConfig) -> tuple[int, ...]:
        """Return the shape of a tensor as the format stores it.

        Args:
            format: The format, one of FORMATS.
            config: Configuration of the model.
        """
        sizes = {**config.axes, **self.sizes, "1": 1, "L": len(self.layer_numbers(config))}
        groups = re.findall(r"\(([^)]*)\)|(\S+)", self.pattern(format))
        return tuple(math.prod(sizes[letter] for letter in (merged or single).split()) for merged, single in groups)

    def pattern(self, format: str) -> str:
        """Return the einops pattern of a tensor as the format stores it: with L in front if layers are stacked.

        Args:
            format: The format, one of FORMATS.
        """
        return f"L {self.axes[format]}" if self.stacked(format) else self.axes[format]

    def stacked(self, format: str) -> bool:
        """Return whether one tensor of the format holds this parameter of all layers.

        Args:
            format: The format, one of FORMATS.
        """
        return self.per_layer and FORMATS[format].stacked

    @property
    def per_layer(self) -> bool:
        """Whether every layer has this parameter."""
        return "{}" in self.huggingface

    @property
    def decayed(self) -> bool:
        """Whether AdamW decays it: matrices and embeddings are decayed, biases and LayerNorm are not."""
        return self.init not in ("zeros", "ones")


def _row(openai: str | None, huggingface: str, torch: str, flax: str, axes: str, init: str) -> Row:
    """`axes` holds the patterns in the order of FORMATS, separated by `|`; a single one is that of all formats."""
    patterns = [pattern.strip() for pattern in axes.split("|")]
    by_format = dict.fromkeys(FORMATS, axes) if len(patterns) == 1 else dict(zip(FORMATS, patterns, strict=True))
    return Row(openai, huggingface, torch, flax, by_format, init)


def _layer_norm(openai: str, huggingface: str, ours: str, flax: str) -> tuple[Row, Row]:
    return (
        _row(f"{openai}/g", f"{huggingface}.weight", f"{ours}.scale", f"{flax}.scale", "D", "ones"),
        _row(f"{openai}/b", f"{huggingface}.bias", f"{ours}.shift", f"{flax}.shift", "D", "zeros"),
    )


def _linear(openai: str, huggingface: str, ours: str, flax: str, weight: str, bias: str, init: str) -> tuple[Row, Row]:
    return (
        _row(f"{openai}/w", f"{huggingface}.weight", f"{ours}.weight", f"{flax}.kernel", weight, init),
        _row(f"{openai}/b", f"{huggingface}.bias", f"{ours}.bias", f"{flax}.bias", bias, "zeros"),
    )


# fmt: off
ROWS: tuple[Row, ...] = (
    _row("model/wte", "wte.weight", "tok_emb.weight", "tok_emb.embedding", "V D", "normal"),
    _row("model/wpe", "wpe.weight", "pos_emb.weight", "pos_emb.embedding", "P D", "position"),
    *_layer_norm("model/h{}/ln_1", "h.{}.ln_1", "trf_blocks.{}.norm1", "trf_blocks.norm1"),
    *_linear("model/h{}/attn/c_attn", "h.{}.attn.c_attn", "trf_blocks.{}.att.qkv_proj", "trf_blocks.att.qkv_proj",
             "1 D (C N H) | D (C N H) | (C N H) D | D C N H", "(C N H) | (C N H) | (C N H) | C N H", "normal"),
    *_linear("model/h{}/attn/c_proj", "h.{}.attn.c_proj", "trf_blocks.{}.att.out_proj", "trf_blocks.att.out_proj",
             "1 (N H) D | (N H) D | D (N H) | N H D", "D", "residual"),
    *_layer_norm("model/h{}/ln_2", "h.{}.ln_2", "trf_blocks.{}.norm2", "trf_blocks.norm2"),
    *_linear("model/h{}/mlp/c_fc", "h.{}.mlp.c_fc", "trf_blocks.{}.ff.in_proj", "trf_blocks.ff.in_proj",
             "1 D F | D F | F D | D F", "F", "normal"),
    *_linear("model/h{}/mlp/c_proj", "h.{}.mlp.c_proj", "trf_blocks.{}.ff.out_proj", "trf_blocks.ff.out_proj",
             "1 F D | F D | D F | F D", "D", "residual"),
    *_layer_norm("model/ln_f", "ln_f", "final_norm", "final_norm"),
    _row(None, "lm_head.weight", "out_head.weight", "out_head.kernel", "V D | V D | V D | D V", "normal"),
)
# fmt: on
"""All parameters that a model can have, in the order of a forward pass."""

QKV_BIAS = "h.{}.attn.c_attn.bias"
"""Name, in the huggingface format, of the parameter that a model without `qkv_bias` lacks."""

OUT_HEAD = "lm_head.weight"
"""Name, in the huggingface format, of the parameter that a model with `tied_head` lacks."""


def rows(config: GPTConfig) -> list[Row]:
    """Return the rows of the table that a model has.

    Args:
        config: Configuration of the model.
    """
    absent = ({OUT_HEAD} if config.tied_head else set()) | (set() if config.qkv_bias else {QKV_BIAS})
    return [row for row in ROWS if row.huggingface not in absent]


def shapes(config: GPTConfig, format: str, table: Sequence[Row] | None = None) -> dict[str, tuple[int, ...]]:
    """Return {name: shape} of every tensor in one format, in the table's order.

    Args:
        config: Configuration of the model.
        format: The format, one of FORMATS.
        table: The rows of the tensors, if they are not all of the model's: a part of it, or its adapters.

    Raises:
        InputError: If the format cannot hold the model: OpenAI's has no untied head.
    """
    table = rows(config) if table is None else table
    return {name: row.shape(format, config) for row in table for name in row.names(format, config)}


def n_params(config: GPTConfig) -> int:
    """Return the number of parameters of a model; a tied head is counted once.

    Args:
        config: Configuration of the model.
    """
    return sum(math.prod(shape) for shape in shapes(config, "huggingface").values())


def check(
    shapes_by_name: Mapping[str, tuple[int, ...]],
    config: GPTConfig,
    format: str,
    origin: str,
    table: Sequence[Row] | None = None,
) -> None:
    """Check that tensors are exactly those of a model.

    Args:
        shapes_by_name: {name: shape} of the tensors.
        config: Configuration of the model.
        format: The format that the names are in.
        origin: Where the tensors come from, for the message.
        table: The rows of the tensors, if they are not all of the model's.

    Raises:
        InputError: If they are not. The message names the first tensors that are missing, unknown or of a wrong
            shape, and counts the others.
    """
    expected = shapes(config, format, table)
    missing = [f"{name} {list(shape)}" for name, shape in expected.items() if name not in shapes_by_name]
    unknown = [f"{name} {list(shape)}" for name, shape in shapes_by_name.items() if name not in expected]
    misshapen = [
        f"{name} has shape {list(shapes_by_name[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in shapes_by_name and tuple(shapes_by_name[name]) != shape
    ]
    if missing or unknown or misshapen:
        kinds = (("missing ", missing), ("unknown ", unknown), ("", misshapen))
        raise InputError(
            f"{origin}: weights do not fit a {format} model of {config.n_layer} layers, width {config.n_embd}: "
            + "; ".join(kind + enumerate_some(problems) for kind, problems in kinds if problems)
        )


def check_dtype(name: str, dtype: Any, origin: str) -> None:
    """Raise InputError unless a NumPy dtype is one that weights may have; dtypes of other libraries pass."""
    if isinstance(dtype, np.dtype) and dtype not in _DTYPES:
        known = ", ".join(map(str, _DTYPES))
        raise InputError(f"{origin}: {printable(name, 120)} has dtype {dtype}; weights must be one of {known}")


def enumerate_some(texts: Sequence[str], most: int = 3) -> str:
    """Return the first texts, each on one line and not too long, and how many more there are."""
    listed = ", ".join(printable(text, 120) for text in texts[:most])
    return f"{listed} and {len(texts) - most} more" if len(texts) > most else listed
