"""The implementations to compare, opened by name or from a Python file, optionally with their own weights."""

import dataclasses
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from parity.comparison.error_bounds import Rounding
from parity.comparison.protocol import Batch, Compute, Weights
from parity.config import GPTConfig
from parity.errors import InputError, install_extras
from parity.training.initial import weights_folder
from parity.training.settings import TrainSettings
from parity.weights import convert
from parity.weights.load import read_folder

MODULES = {"torch": "gpt_torch.adapter", "jax": "gpt_jax.adapter", "numpy": "parity.reference"}


@dataclasses.dataclass(frozen=True)
class Implementation:
    """An implementation of GPT-2, called with the functions of `parity.comparison.protocol.Backend`."""

    name: str
    module: Any
    """A module, or any object, with some of the functions of `Backend`."""
    own_weights: Weights | None = None
    """Weights that replace those of the call, cast to their dtype; None means the weights of the call."""

    def offers(self, function: str) -> bool:
        """Whether the implementation has this function of `Backend`."""
        return hasattr(self.module, function)

    def activations(
        self, config: GPTConfig, weights: Weights, tokens: np.ndarray, names: Iterable[str], compute: Compute
    ) -> dict[str, np.ndarray]:
        return self.module.activations(config, self._weights(weights), tokens, names, compute)

    def cached_logits(
        self, config: GPTConfig, weights: Weights, tokens: np.ndarray, start: int, compute: Compute
    ) -> np.ndarray:
        return self.module.cached_logits(config, self._weights(weights), tokens, start, compute)

    def generate(
        self, config: GPTConfig, weights: Weights, prompts: Sequence[Sequence[int]], compute: Compute, **options: Any
    ) -> list[list[int]]:
        return self.module.generate(config, self._weights(weights), prompts, compute, **options)

    def loss_and_gradients(
        self, config: GPTConfig, weights: Weights, inputs: np.ndarray, targets: np.ndarray, compute: Compute
    ) -> tuple[float, dict[str, np.ndarray]]:
        return self.module.loss_and_gradients(config, self._weights(weights), inputs, targets, compute)

    def train(
        self,
        config: GPTConfig,
        weights: Weights,
        settings: TrainSettings,
        batches: Iterable[Batch],
        after_step: Callable[[dict[str, np.ndarray]], None] | None = None,
    ) -> list[tuple[float, float]]:
        return self.module.train(config, self._weights(weights), settings, batches, after_step)

    def perturbed(self, config: GPTConfig, noise: Mapping[str, Rounding]) -> AbstractContextManager[None]:
        """A context in which rounding errors are added to activations and gradients; only gpt_torch offers it."""
        return self.module.perturbed(config, noise)

    def _weights(self, weights: Weights) -> Weights:
        if self.own_weights is None:
            return weights
        dtype = next(iter(weights.values())).dtype
        return {name: array.astype(dtype) for name, array in self.own_weights.items()}


def open_implementation(
    spec: str, config: GPTConfig, aliases: Mapping[str, Path] | None = None, source: str | None = None
) -> Implementation:
    """Open an implementation by name or file.

    Args:
        spec: "torch", "jax", "numpy", an alias or the path of a Python file. Append ":WEIGHTS" (a size, a run or a
            folder) to give the implementation its own weights.
        config: The configuration of the comparison, which an implementation's own weights must match.
        aliases: {name: Python file} of further names.
        source: The size, run or folder that the weights of the comparison come from. An implementation that reads
            config.json itself (see `Backend.open_folder`) follows the file in that folder, or in its own weights'.

    Raises:
        InputError: For an unknown name, a framework that is not installed, a file without `activations`, or
            weights of another shape.
    """
    name, _, origin = spec.partition(":")
    files = aliases or {}
    path = files.get(name, Path(name))
    if name in MODULES:
        module = _import_backend(name)
    elif path.suffix == ".py" and path.is_file():
        module = _import_file(path)
    else:
        known = ", ".join([*MODULES, *files])
        raise InputError(f"{name!r} is not an implementation; choose one of {known}, or give a Python file")
    if not hasattr(module, "activations"):
        raise InputError(f"{path} has no function activations(config, weights, tokens, names, compute); define it")
    own_weights = _own_weights(origin, config) if origin else None
    if hasattr(module, "open_folder") and (origin or source):
        folder = weights_folder(origin or source or "")
        if (folder / "config.json").is_file():
            module = module.open_folder(folder)
    return Implementation(spec, module, own_weights)


def _import_backend(name: str) -> ModuleType:
    try:
        return importlib.import_module(MODULES[name])
    except ModuleNotFoundError as error:
        raise InputError(
            f"the {name} implementation needs {error.name}, which is not installed: {install_extras(name)}"
        ) from None


def _import_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} cannot be imported as a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_weights(origin: str) -> tuple[GPTConfig, dict[str, np.ndarray]]:
    """Read the configuration and all weights, in the huggingface format, of a size, a run or a folder.

    Raises InputError as parity.training.initial.weights_folder and parity.weights.load.read_folder do.
    """
    config, arrays, format = read_folder(weights_folder(origin))
    return config, dict(convert(arrays, format, "huggingface", config, origin=origin))


def _own_weights(origin: str, config: GPTConfig) -> Weights:
    own_config, arrays = read_weights(origin)
    if dataclasses.replace(own_config, drop_rate=config.drop_rate) != config:
        raise InputError(f"{origin} holds a model of another shape ({own_config}) than the comparison's ({config})")
    return arrays
