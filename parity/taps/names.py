"""The names of activations, patterns that stand for several of them, and the axes of each."""

import fnmatch
from collections.abc import Iterable, Mapping
from typing import Any

from parity.config import GPTConfig
from parity.errors import InputError

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
"""The axes of each activation, in the order of a forward pass; `{}` stands for the number of a layer."""

ONLY_EXPLICIT = ("attn.scores", "attn.pattern")
"""Activations that a fused attention kernel never stores."""


def activation_names(config: GPTConfig) -> list[str]:
    """Return all activation names of a model, in the order of a forward pass.

    Args:
        config: The model's configuration.
    """
    per_layer = [name for name in AXES if "{}" in name]
    layers = [name.format(number) for number in range(config.n_layer) for name in per_layer]
    return ["embed", *layers, "ln_f", "logits"]


def axes(name: str) -> str:
    """Return the axes of an activation.

    Args:
        name: Name of the activation, for example "blocks.3.ln_1".

    Returns:
        The axis letters, for example "B T D".
    """
    parts = name.split(".")
    return AXES[".".join(["blocks", "{}", *parts[2:]]) if parts[0] == "blocks" else name]


def select(names: Iterable[str] | str | None, config: GPTConfig) -> list[str]:
    """Expand patterns to the activation names of a model.

    Args:
        names: A name or several; `*` matches any text, as in "blocks.*.attn.pattern". None selects all.
        config: The model's configuration.

    Returns:
        The selected names, each once, in the order of a forward pass.

    Raises:
        InputError: For a name that matches nothing.
    """
    if names is None:
        return activation_names(config)
    selected = {match for name in ([names] if isinstance(names, str) else names) for match in _matches(name, config)}
    return [name for name in activation_names(config) if name in selected]


def _matches(pattern: str, config: GPTConfig) -> list[str]:
    known = activation_names(config)
    matches = fnmatch.filter(known, pattern)
    if not matches:
        raise InputError(f"no activation is called {pattern!r}; a model of {config.n_layer} layers has {known}")
    return matches


Patch = Any
"""A number or an array of any framework that broadcasts to the shape of an activation, or a function from it to one."""


def expand_patches(patches: Mapping[str, Patch], config: GPTConfig) -> dict[str, Patch]:
    """Return patches with the patterns in their names expanded.

    Args:
        patches: {name or pattern: patch}.
        config: The model's configuration.

    Returns:
        {name: patch}.

    Raises:
        InputError: For a name that matches nothing, and for an activation with two patches.
    """
    expanded: dict[str, Patch] = {}
    key_of: dict[str, str] = {}
    for key, patch in patches.items():
        for name in _matches(key, config):
            if name in expanded:
                raise InputError(f"{name} has two patches, {key_of[name]!r} and {key!r}; give one of them")
            expanded[name], key_of[name] = patch, key
    return expanded
