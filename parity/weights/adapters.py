"""LoRA (Hu et al. 2021): what an adapter is, its table of parameters, its initial values, and its sum with the base.

Beside a linear layer y = W x + b an adapter computes scale * B A x, with A [R, in] and B [out, R] of a small rank R,
so that only A and B are trained. The rows of the table are like those of a model (parity/weights/table.py): their
huggingface names are peft's, and conversion.py converts them.

The query, key and value projections are one matrix. Adapted together they have one A and one B (the target `qkv`);
adapted one by one, as in the paper (`q`, `v`), they have a rank each. A then holds the rows of all of them, and B has
blocks: the columns of one of them are zero in the outputs of the others, and stay zero. peft can hold either.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from einops import rearrange

from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights.lazy import LazyTensor
from parity.weights.table import ROWS, Row

PARTS = ("q", "k", "v")
"""Targets that are parts of one matrix, in the order of axis C."""
LINEARS = {
    "qkv": "h.{}.attn.c_attn",
    "attn.out": "h.{}.attn.c_proj",
    "mlp.in": "h.{}.mlp.c_fc",
    "mlp.out": "h.{}.mlp.c_proj",
}
"""{target: the linear layer's name in the huggingface format}."""
TARGETS = ("all", *LINEARS, *PARTS)
PREFIX = "base_model.model.transformer."
"""What peft puts before the names of transformers' GPT2Model."""
_LARGEST_RANK = 2**16


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Options of a LoRA adapter (Hu et al. 2021); their names are peft's where it has them.

    Raises:
        InputError: For a value out of range, and for targets that are unknown or adapt a matrix twice.
    """

    rank: int = 16
    """Rank of A and B. Each of q, k and v that is adapted on its own has this rank."""
    alpha: float = 16.0
    """The adapter's output is multiplied by alpha / rank."""
    dropout: float = 0.0
    """Dropout probability of the adapter's input, during training; the base's own input is not dropped."""
    targets: tuple[str, ...] = ("all",)
    """The linear layers to adapt: qkv, attn.out, mlp.in and mlp.out; all of these (all); or q, k and v one by one."""
    rslora: bool = False
    """Multiply the output by alpha / sqrt(rank) instead, so that its size does not depend on the rank (Kalajdzievski
    2023)."""

    def __post_init__(self) -> None:
        if type(self.rank) is not int or not 1 <= self.rank <= _LARGEST_RANK:
            raise InputError(f"the rank of an adapter must be an integer in 1..{_LARGEST_RANK}, got {self.rank!r:.60}")
        for name in ("alpha", "dropout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise InputError(f"the {name} of an adapter must be a number, got {value!r:.60}")
        if not 0 <= self.dropout < 1:
            raise InputError(f"the dropout of an adapter must be in [0, 1), got {self.dropout!r:.60}")
        if isinstance(self.targets, str) or not isinstance(self.targets, Sequence):
            raise InputError(f'the targets of an adapter must be a tuple such as ("q", "v"), got {self.targets!r:.60}')
        object.__setattr__(self, "targets", tuple(self.targets))
        if unknown := [target for target in self.targets if target not in TARGETS]:
            raise InputError(f"the adapter's target {unknown[0]!r:.60} is unknown; choose from {', '.join(TARGETS)}")
        if not self.targets:
            raise InputError(f"an adapter needs targets; choose from {', '.join(TARGETS)}")
        layers = [layer for target in self.targets for layer in (LINEARS if target == "all" else (target,))]
        if len(set(layers)) < len(layers) or ("qkv" in layers and not set(PARTS).isdisjoint(layers)):
            raise InputError(f"the adapter's targets {', '.join(self.targets)} name a matrix twice; name it once")

    @property
    def scale(self) -> float:
        """The factor of the adapter's output."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)


@dataclasses.dataclass(frozen=True)
class AdaptedLinear:
    """A linear layer of every block that has an adapter."""

    weight: Row
    """The row of its weight."""
    rank: int
    """Axis R: the rank of A and B."""
    parts: tuple[int, ...] = ()
    """Indices on axis C of the query, key and value that have `rank / len(parts)` each; empty for a single one."""

    def path(self, format: str) -> str:
        """The layer's name in a format, with `{}` for the number of the block."""
        return str(self.weight.name(format)).rpartition(".")[0]

    @property
    def block_mask(self) -> np.ndarray | None:
        """bool [C, R], true where B may differ from zero; None if it may everywhere."""
        if not self.parts:
            return None
        owner = np.repeat(self.parts, self.rank // len(self.parts))  # [R]
        return np.arange(3)[:, None] == owner

    @property
    def rows(self) -> tuple[Row, Row]:
        """The rows of A and B."""
        out, into = (group.strip("()") for group in _groups(self.weight.axes["torch"]))
        paths = {format: self.path(format) for format in ("huggingface", "torch", "flax")}

        def row(matrix: str, ours: str, flax: str) -> Row:
            return Row(
                openai=None,
                huggingface=f"{PREFIX}{paths['huggingface']}.{matrix}.weight",
                torch=f"{paths['torch']}.{matrix}",
                flax=f"{paths['flax']}.{matrix}",
                axes={"huggingface": ours, "torch": ours, "flax": flax},
                init=matrix,
                sizes={"R": self.rank},
            )

        return row("lora_A", f"R ({into})", f"{into} R"), row("lora_B", f"({out}) R", f"R {out}")


def _groups(pattern: str) -> tuple[str, str]:
    """Split the pattern of a matrix into those of its two axes."""
    first, _, second = pattern.partition(") ") if pattern.startswith("(") else pattern.partition(" ")
    return first, second


def adapted_linears(lora: LoraConfig) -> list[AdaptedLinear]:
    """The linear layers that an adapter changes, in the order of the table."""
    targets = set(LINEARS) if "all" in lora.targets else set(lora.targets)
    parts = tuple(number for number, part in enumerate(PARTS) if part in targets)
    linears = []
    for target, path in LINEARS.items():
        [weight] = [row for row in ROWS if row.huggingface == f"{path}.weight"]
        if target in targets:
            linears.append(AdaptedLinear(weight, lora.rank))
        elif target == "qkv" and parts:
            linears.append(AdaptedLinear(weight, lora.rank * len(parts), parts))
    return linears


def adapter_rows(lora: LoraConfig) -> list[Row]:
    """The table of an adapter's parameters."""
    return [row for linear in adapted_linears(lora) for row in linear.rows]


def n_adapter_params(config: GPTConfig, lora: LoraConfig) -> int:
    """Number of parameters that are trained: those of A and B, without the blocks of B that stay zero."""
    total = 0
    for linear in adapted_linears(lora):
        a, b = (math.prod(row.shape("torch", config)) for row in linear.rows)
        total += a + (b // 3 if linear.parts else b)
    return total * config.n_layer


def initial_adapter(config: GPTConfig, lora: LoraConfig, seed: int, dtype: Any = np.float32) -> dict[str, np.ndarray]:
    """Draw the initial values of an adapter, in the huggingface format.

    As in Hu et al.'s code, A is uniform in +-1/sqrt(in) and B is zero, so that the adapted model starts as the base.
    The numbers of a tensor depend only on the seed and its name.
    """
    arrays = {}
    for row in adapter_rows(lora):
        shape = row.shape("huggingface", config)
        for name in row.names("huggingface", config):
            array = np.zeros(shape, np.float32)
            if row.init == "lora_A":
                key = np.random.SeedSequence([seed, zlib.crc32(name.encode())])
                array = np.random.Generator(np.random.Philox(key)).uniform(-1, 1, shape).astype(np.float32)
                array /= np.float32(math.sqrt(shape[1]))
            arrays[name] = array.astype(dtype, copy=False)
    return arrays


def merged(
    arrays: Mapping[str, Any], format: str, config: GPTConfig, lora: LoraConfig, adapter: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the weights of a model with an adapter added to them, W + scale * B A, in float32 or float64.

    Args:
        arrays: The base's weights, in `format`. They are not changed.
        format: Their format, which is also that of the result.
        config: The model's configuration.
        lora: The adapter's options.
        adapter: The adapter's arrays in the huggingface format.

    Returns:
        {name: array}; a weight that the adapter changes is computed when it is read.
    """
    result = dict(arrays)
    for linear in adapted_linears(lora):
        row = linear.weight
        factors = [[adapter[name] for name in part.names("huggingface", config)] for part in linear.rows]
        pairs = list(zip(*factors, strict=True))  # one (A, B) per layer
        pattern = f"{row.axes['torch']} -> {row.axes[format]}"
        sizes = {letter: size for letter, size in config.axes.items() if letter in pattern}
        names = row.names(format, config)
        for number, name in enumerate(names):
            own = pairs if row.stacked(format) else pairs[number : number + 1]
            dtype = np.promote_types(arrays[name].dtype, np.float32)
            read = functools.partial(
                _add, arrays[name], own, lora.scale, pattern, sizes, dtype, stacked=row.stacked(format)
            )
            result[name] = LazyTensor(name, tuple(arrays[name].shape), dtype, read)
    return result


def _add(
    weight: Any,
    pairs: Sequence[tuple[Any, Any]],
    scale: float,
    pattern: str,
    sizes: Mapping[str, int],
    dtype: np.dtype,
    stacked: bool,
) -> np.ndarray:
    total = np.array(weight, dtype)  # a copy
    for layer, (a, b) in enumerate(pairs):
        product = np.asarray(b, dtype) @ np.asarray(a, dtype) * dtype.type(scale)
        target = total[layer] if stacked else total
        target += rearrange(product, pattern, **sizes)
    return total
