"""The implementations that scripts/check_parity.py is asked to compare, by name or from a file."""

import dataclasses
import functools
import importlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np

from parity import weights
from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights.load import read_folder

MODULES = {"torch": "gpt_torch.adapter", "jax": "gpt_jax.adapter", "numpy": "parity.reference"}


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An implementation, and weights of its own if it was given some."""

    name: str
    module: Any
    weights: dict[str, np.ndarray] | None

    def __getattr__(self, method: str) -> Any:
        """The implementation's method, which gets the side's own weights in place of the case's."""
        found = getattr(self.module, method)
        if self.weights is None or method.startswith("__"):
            return found

        @functools.wraps(found)
        def with_own(config: GPTConfig, given: dict[str, np.ndarray], *args: Any, **options: Any) -> Any:
            dtype = next(iter(given.values())).dtype
            return found(config, {n: a.astype(dtype) for n, a in (self.weights or {}).items()}, *args, **options)

        return with_own


def open_implementation(text: str, hugging_face: Path, config: GPTConfig) -> Implementation:
    """ "torch", "jax", "numpy", "hf", or a Python file; then, after a colon, weights: a size or a folder.

    `hugging_face`: the file that stands for "hf". Raises InputError for what is neither.
    """
    name, _, source = text.partition(":")
    path = hugging_face if name == "hf" else Path(name)
    if name in MODULES:
        module: Any = importlib.import_module(MODULES[name])
    elif path.suffix == ".py" and path.is_file():
        module = _from_file(path)
    else:
        raise InputError(f"{name!r} is no implementation; choose {', '.join([*MODULES, 'hf'])}, or a Python file")
    if not hasattr(module, "activations"):
        raise InputError(f"{path} has no function activations(config, weights, tokens, names, compute)")
    return Implementation(text, module, read_weights(source, config) if source else None)


def _from_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_weights(source: str, config: GPTConfig | None) -> dict[str, np.ndarray]:
    """Weights in the huggingface format; raises InputError where they are of another shape than `config`."""
    found, arrays, format = read_folder(source)
    if config is not None and dataclasses.replace(found, drop_rate=config.drop_rate) != config:
        raise InputError(f"{source} holds a model of another shape ({found}) than the other side ({config})")
    return dict(weights.convert(arrays, format, "huggingface", found, origin=source))


def sharp_weights(config: GPTConfig, seed: int) -> dict[str, np.ndarray]:
    """Initial weights with matrices five times as large and random biases: attention is sharp, logits exceed 1."""
    generator = np.random.default_rng(seed)
    arrays = weights.initial_weights(config, seed)
    for name, array in arrays.items():
        if "bias" in name:
            array += generator.normal(size=array.shape).astype(np.float32) * 0.1
        elif "ln_" not in name and name not in ("wte.weight", "wpe.weight"):
            array *= 5
    return arrays
