"""THE table of parameters: names, axes and orientation in every format, and the one converter.

Formats:

    openai       OpenAI's TF checkpoint; matrices are [1, in, out], variables start with `model/`
    huggingface  transformers' GPT2LMHeadModel without its `transformer.` prefix; [in, out]
    torch        state_dict of gpt_torch.GPTModel; nn.Linear keeps [out, in]
    flax         parameter paths of gpt_jax.GPTModel; axes unmerged, the L layers stacked in front

Axes are written as einops patterns over the letters of parity.config. So the orientation of every
tensor is stated, never guessed: a square matrix converts as surely as any other.
"""

import dataclasses
import math
import re
import warnings
import zlib
from collections.abc import Iterator, Mapping
from typing import Any, Literal

import numpy as np
from einops import rearrange

from parity.config import GPTConfig
from parity.errors import InputError

FORMATS = ("openai", "huggingface", "torch", "flax")


@dataclasses.dataclass(frozen=True)
class Row:
    """One parameter. In names, `{}` is the layer; `None` says that the format cannot hold it."""

    openai: str | None
    huggingface: str
    torch: str
    flax: str
    axes: Mapping[str, str]
    """{format: einops pattern}, of one layer."""
    init: str
    """normal, residual (normal, scaled down by depth), position, zeros or ones."""

    def name(self, format: str) -> str | None:
        return getattr(self, format)

    @property
    def per_layer(self) -> bool:
        return "{}" in self.huggingface

    @property
    def decayed(self) -> bool:
        """Whether AdamW decays it: matrices and embeddings, not biases and LayerNorm."""
        return self.init in ("normal", "residual", "position")


def _row(openai: str | None, huggingface: str, torch: str, flax: str, axes: str, init: str) -> Row:
    """`axes`: of openai, huggingface, torch and flax, separated by `|`; one alone holds for all."""
    each = [part.strip() for part in axes.split("|")]
    by_format = dict(zip(FORMATS, each if len(each) == 4 else each * 4, strict=True))
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
QKV_BIAS = "h.{}.attn.c_attn.bias"
OUT_HEAD = "lm_head.weight"


def rows(config: GPTConfig) -> list[Row]:
    """The rows that a model of this configuration has."""
    absent = ({OUT_HEAD} if config.tied_head else set()) | (set() if config.qkv_bias else {QKV_BIAS})
    return [row for row in ROWS if row.huggingface not in absent]


def _shape(axes: str, config: GPTConfig) -> tuple[int, ...]:
    sizes = {**config.axes, "1": 1}
    groups = re.findall(r"\(([^)]*)\)|(\S+)", axes)
    return tuple(math.prod(sizes[letter] for letter in (merged or single).split()) for merged, single in groups)


def shapes(config: GPTConfig, format: str) -> dict[str, tuple[int, ...]]:
    """{name: shape} of every parameter of a model in one format, in the table's order.

    Raises InputError where the format cannot hold the model: OpenAI's has no untied head.
    """
    found: dict[str, tuple[int, ...]] = {}
    for row in rows(config):
        name, shape = row.name(format), _shape(row.axes[format], config)
        if name is None:
            raise InputError(f"the {format} format has no place for {row.huggingface}; use tied_head=True")
        if row.per_layer and format == "flax":
            found[name] = (config.n_layer, *shape)
        elif row.per_layer:
            found |= {name.format(layer): shape for layer in range(config.n_layer)}
        else:
            found[name] = shape
    return found


def n_params(config: GPTConfig) -> int:
    """Number of parameters, a tied head counted once."""
    return sum(math.prod(shape) for shape in shapes(config, "huggingface").values())


def check(found: Mapping[str, tuple[int, ...]], config: GPTConfig, format: str, origin: str) -> None:
    """Raise one InputError that lists every missing, unknown and wrongly shaped name."""
    expected = shapes(config, format)
    problems = [f"missing {name} {list(shape)}" for name, shape in expected.items() if name not in found]
    problems += [f"unknown {name} {list(shape)}" for name, shape in found.items() if name not in expected]
    problems += [
        f"{name} has shape {list(found[name])}, expected {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != shape
    ]
    if problems:
        raise InputError(
            f"{origin}: weights do not fit a {format} model of {config.n_layer} layers, width {config.n_embd}: "
            + "; ".join(problems)
        )


def convert(
    weights: Mapping[str, Any],
    from_format: str,
    to_format: str,
    config: GPTConfig,
    dtype: Any = None,
    origin: str = "weights",
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (name, array) in the target format, checking names and shapes of the source first.

    `weights` may load its values on access: each is taken once, and the largest tensors come first,
    so that a model's memory is never needed twice. Arrays may be views of the source's.
    `dtype=None` keeps each tensor's own. Raises InputError (see `check`).
    """
    check({name: tuple(array.shape) for name, array in weights.items()}, config, from_format, origin)
    shapes(config, to_format)  # that the target can hold it
    by_size = sorted(rows(config), key=lambda row: -math.prod(_shape(row.axes[to_format], config)))
    for row in by_size:
        pattern = f"{row.axes[from_format]} -> {row.axes[to_format]}"
        source_name, target_name = row.name(from_format), row.name(to_format)
        assert source_name is not None
        assert target_name is not None

        def one(array: Any, pattern: str = pattern) -> np.ndarray:
            sizes = {letter: size for letter, size in config.axes.items() if letter in pattern}
            moved = rearrange(np.asarray(array), pattern, **sizes)
            return moved if dtype is None else moved.astype(dtype, copy=False)

        if not row.per_layer:
            yield target_name, one(weights[source_name])
        elif from_format == to_format == "flax":
            yield target_name, np.asarray(weights[source_name], dtype)
        elif to_format == "flax":
            first = one(weights[source_name.format(0)])
            stacked = np.empty((config.n_layer, *first.shape), first.dtype)
            stacked[0] = first
            for layer in range(1, config.n_layer):
                stacked[layer] = one(weights[source_name.format(layer)])
            yield target_name, stacked
            del stacked, first
        else:
            stack = np.asarray(weights[source_name]) if from_format == "flax" else None
            for layer in range(config.n_layer):
                array = weights[source_name.format(layer)] if stack is None else stack[layer]
                yield target_name.format(layer), one(array)


def warn_if_not_finite(name: str, array: np.ndarray, origin: str) -> None:
    """Warn, naming it, of a tensor with NaN or infinity."""
    if not np.isfinite(array.sum(dtype=np.float64)):
        count = array.size - int(np.isfinite(array).sum())
        warnings.warn(f"{origin}: {name} has {count} values that are not finite", stacklevel=3)


def initial_weights(
    config: GPTConfig, seed: int, dtype: Any = np.float32, scheme: Literal["gpt2", "torch"] = "gpt2"
) -> dict[str, np.ndarray]:
    """Initial weights in the huggingface format: the same for both backends.

    gpt2: as in openai/gpt-2 src/model.py, normal with 0.02, 0.01 for wpe; LayerNorm 1 and 0; biases 0.
    Radford et al. 2019, section 2.3: projections onto the residual stream scaled by 1/sqrt(2 L).
    torch: what the layers of torch.nn draw by default, and so the notebook's own model: embeddings normal
    with 1, matrices and biases uniform up to 1/sqrt(fan_in).
    Each tensor's numbers depend on the seed and its own name only.
    """
    scale = {"normal": 0.02, "position": 0.01, "residual": 0.02 / math.sqrt(2 * config.n_layer)}
    sizes = shapes(config, "huggingface")
    weights = {}
    for row in rows(config):
        for name in (row.huggingface.format(layer) for layer in range(config.n_layer if row.per_layer else 1)):
            shape = sizes[name]
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, zlib.crc32(name.encode())])))
            if "ln_" in name or (scheme == "gpt2" and row.init == "zeros"):
                draw = np.full(shape, row.init == "ones", np.float32)
            elif scheme == "torch" and name not in ("wte.weight", "wpe.weight"):
                fan_in = config.n_embd if name == OUT_HEAD else sizes[name.replace("bias", "weight")][0]
                draw = generator.uniform(-1, 1, shape).astype(np.float32) / np.float32(math.sqrt(fan_in))
            else:
                draw = generator.standard_normal(shape, np.float32)
                draw *= scale[row.init] if scheme == "gpt2" else 1
            weights[name] = draw.astype(dtype, copy=False)
    return weights
