"""Named activations: the places in a model where one can look, or put something else. The same in every backend.

    embed                                    B T D    token and position embedding, added
    blocks.3.ln_1, blocks.3.ln_2             B T D    what attention and MLP read
    blocks.3.attn.q, .k, .v                  B T N H
    blocks.3.attn.scores                     B N T S  scaled, before the mask
    blocks.3.attn.pattern                    B N T S  after mask and softmax
    blocks.3.attn.z                          B T N H  values averaged by the pattern
    blocks.3.attn.out, blocks.3.mlp.out      B T D    what a branch adds to the residual stream
    blocks.3.mlp.pre, .post                  B T F    before and after GELU
    blocks.3.resid_mid, .resid_post          B T D    the residual stream after attention, after the MLP
    ln_f                                     B T D
    logits                                   B T V

A model calls tap(name, x) at each place. Without a probe that is x itself, and a compiled program has nothing
of it; under a probe the activation is noted, or replaced.
"""

import contextlib
import dataclasses
import fnmatch
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from parity.config import GPTConfig
from parity.errors import InputError

# Axes of each activation, in the order in which a forward pass meets them.
AXES = {
    "embed": "B T D",
    "blocks.{}.ln_1": "B T D",
    "blocks.{}.attn.q": "B T N H",
    "blocks.{}.attn.k": "B T N H",
    "blocks.{}.attn.v": "B T N H",
    "blocks.{}.attn.scores": "B N T S",
    "blocks.{}.attn.pattern": "B N T S",
    "blocks.{}.attn.z": "B T N H",
    "blocks.{}.attn.out": "B T D",
    "blocks.{}.resid_mid": "B T D",
    "blocks.{}.ln_2": "B T D",
    "blocks.{}.mlp.pre": "B T F",
    "blocks.{}.mlp.post": "B T F",
    "blocks.{}.mlp.out": "B T D",
    "blocks.{}.resid_post": "B T D",
    "ln_f": "B T D",
    "logits": "B T V",
}
ONLY_EXPLICIT = ("attn.scores", "attn.pattern")
"""Fused attention never holds these."""


def activation_names(config: GPTConfig) -> list[str]:
    """All names of a model, in the order of a forward pass."""
    before, layer, after = (
        [name for name in AXES if name == "embed"],
        [name for name in AXES if "{}" in name],
        ["ln_f", "logits"],
    )
    return before + [name.format(i) for i in range(config.n_layer) for name in layer] + after


def axes(name: str) -> str:
    """The axes of an activation, "B T D" say."""
    parts = name.split(".")
    return AXES[".".join(["blocks", "{}", *parts[2:]]) if parts[0] == "blocks" else name]


def select(names: Iterable[str] | str | None, config: GPTConfig) -> list[str]:
    """The model's names that match: None is all, and `*` in a name is anything ("blocks.*.attn.pattern").

    Raises InputError for one that matches nothing.
    """
    known = activation_names(config)
    if names is None:
        return known
    chosen: set[str] = set()
    for name in [names] if isinstance(names, str) else names:
        found = fnmatch.filter(known, name)
        if not found:
            raise InputError(f"no activation is called {name!r}; a model of {config.n_layer} layers has {known}")
        chosen.update(found)
    return [name for name in known if name in chosen]


Patch = Any
"""A function of the activation, or what takes its place: an array that broadcasts to its shape."""


@dataclasses.dataclass
class Probe:
    """What a run is looked at with."""

    names: frozenset[str]
    patches: Mapping[str, Patch]
    convert: Callable[[Any, Any], Any]
    """(a patch's value, the activation) -> the value as an array like the activation"""
    cache: dict[str, Any] = dataclasses.field(default_factory=dict)
    layer: int | None = None

    def see(self, name: str, x: Any) -> Any:
        if self.layer is not None:
            name = f"blocks.{self.layer}.{name}"
        if name in self.patches:
            patch = self.patches[name]
            x = patch(x) if callable(patch) else self._replacement(name, patch, x)
        if name in self.names:
            self.cache[name] = x
        return x

    def _replacement(self, name: str, value: Any, x: Any) -> Any:
        shape, wanted = tuple(value.shape), tuple(x.shape)
        padded = (1,) * (len(wanted) - len(shape)) + shape
        if len(padded) != len(wanted) or any(a not in (1, b) for a, b in zip(padded, wanted, strict=True)):
            raise InputError(f"patch of {name} has shape {list(shape)}, the activation [{axes(name)}] {list(wanted)}")
        return self.convert(value, x)

    @property
    def needs_explicit_attention(self) -> bool:
        return any(name.endswith(ONLY_EXPLICIT) for name in [*self.names, *self.patches])


_probe: Probe | None = None
_place: Callable[[str, Any], Any] | None = None


def tap(name: str, x: Any) -> Any:
    """x, or what a probe puts in its place; else placed where placing() says."""
    if _probe is not None:
        return _probe.see(name, x)
    return x if _place is None else _place(AXES[name if name in AXES else f"blocks.{{}}.{name}"], x)


@contextlib.contextmanager
def placing(place: Callable[[str, Any], Any]) -> Iterator[None]:
    """Within it, tap() gives place(axes, x), the axes as in "B T D": the same values, laid over devices."""
    global _place
    outer, _place = _place, place
    try:
        yield
    finally:
        _place = outer


def probing() -> bool:
    """Whether a probe is at work: layers are then run by name, not scanned over."""
    return _probe is not None


def attention(kind: str) -> str:
    """The attention to run where a model would run `kind`: scores and patterns exist in the explicit one only."""
    return "explicit" if _probe is not None and _probe.needs_explicit_attention else kind


def layer(number: int | None) -> None:
    """Says which layer runs from here on; None: none."""
    if _probe is not None:
        _probe.layer = number


@contextlib.contextmanager
def probe(
    config: GPTConfig,
    names: Iterable[str] | str | None,
    patches: Mapping[str, Patch] | None = None,
    convert: Callable[[Any, Any], Any] = lambda value, x: value,
) -> Iterator[dict[str, Any]]:
    """Within it, models note the activations `names` in the dict it gives, and take `patches`.

    One probe at a time, and on one thread. Raises InputError for names that the model does not have.
    """
    global _probe
    wanted = frozenset(select(names, config))
    select(list(patches or {}), config)
    outer, _probe = _probe, Probe(wanted, patches or {}, convert)
    try:
        yield _probe.cache
    finally:
        _probe = outer


def run(
    model: Any,
    tokens: Any,
    names: Iterable[str] | str | None,
    patches: Mapping[str, Patch] | None,
    convert: Callable[[Any, Any], Any],
) -> tuple[Any, dict[str, Any]]:
    """run_with_cache() of a backend: model(tokens) under a probe, with a warning where other attention runs for it."""
    with probe(model.config, names, patches, convert) as cache:
        if attention(model.attention) != model.attention:
            warnings.warn(
                f"the explicit attention runs, not {model.attention}, which never holds scores and patterns",
                stacklevel=3,
            )
        logits = model(tokens)
    return logits, cache
