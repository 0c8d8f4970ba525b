"""The optimizer state of a checkpoint, whichever backend wrote it: AdamW's moments beside model.safetensors.

gpt_torch writes optimizer.safetensors, with names in the huggingface format. gpt_jax writes the folder state/ with
orbax; without JAX it is read with tensorstore, the library that orbax itself stores arrays with.
"""

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from parity import weights
from parity.config import GPTConfig
from parity.errors import InputError, pip_install
from parity.weights import Row, huggingface, peft_files
from parity.weights.classifier import CLASSIFIER_FILE

ORBAX_FOLDER = "state"
OPTIMIZER_FILE = "optimizer.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")
"""AdamW's running means of the gradient and of its square, in torch's names; optax calls them mu and nu."""


@dataclasses.dataclass(frozen=True)
class StoredState:
    """The train state of a checkpoint: parameters and moments, and how many updates made them."""

    step: int
    """Number of updates made: AdamW's count, which skipped steps do not raise."""
    arrays: Mapping[str, Mapping[str, Any]]
    """{"parameters", "exp_avg" and "exp_avg_sq": {name: array}}. Parameters that were not trained have no moments."""
    formats: Mapping[str, str]
    """{part: format of its names}."""
    trainable: Sequence[Row]
    """The rows of the parameters that were trained."""

    def converted(self, part: str, target: str, config: GPTConfig) -> dict[str, np.ndarray]:
        """Return the trained parameters, or their moments, in another weight format (parity/weights/table.py)."""
        format = self.formats[part]
        arrays = {name: self.arrays[part][name] for name in weights.shapes(config, format, self.trainable)}
        return dict(weights.convert(arrays, format, target, config, origin=part, table=self.trainable))


def write_optimizer(folder: Path, step: int, moments: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    """Write optimizer.safetensors.

    Args:
        folder: The checkpoint's folder.
        step: Number of updates made.
        moments: {moment: {huggingface name: array}}.
    """
    named = {f"{moment}.{name}": array for moment, part in moments.items() for name, array in part.items()}
    huggingface.save_tensors(folder / OPTIMIZER_FILE, named, {"step": str(step)})


def read(
    folder: Path, config: GPTConfig, stored: Sequence[Row] | None = None, trainable: Sequence[Row] | None = None
) -> StoredState:
    """Return the train state in a checkpoint's folder; parameters are read from disk when they are used.

    Args:
        folder: The checkpoint's folder.
        config: Configuration of the model.
        stored: The rows of the parameters in the checkpoint, by default all of the model's.
        trainable: The rows of those that were trained, by default all in the checkpoint.

    Raises:
        InputError: If the folder holds no optimizer state, or the state of a model of another shape.
    """
    stored = weights.rows(config) if stored is None else stored
    trainable = stored if trainable is None else trainable
    parameters = read_weights(folder, config, stored)
    if (folder / ORBAX_FOLDER).is_dir():
        step, moments = _from_orbax(folder / ORBAX_FOLDER, config, trainable)
        format = "flax"
    else:
        step, moments = _from_safetensors(folder)
        format = "huggingface"
    for moment, arrays in moments.items():
        origin = f"{folder}: {moment}"
        weights.check({name: tuple(a.shape) for name, a in arrays.items()}, config, format, origin, trainable)
    formats = {"parameters": "huggingface", **dict.fromkeys(MOMENTS, format)}
    return StoredState(step, {"parameters": parameters, **moments}, formats, trainable)


def read_weights(folder: Path, config: GPTConfig, stored: Sequence[Row] | None) -> Mapping[str, Any]:
    """Return the parameters that a checkpoint's file of weights, or its adapter, holds; values are read when used."""
    if (folder / peft_files.CONFIG_FILE).is_file():
        adapter = peft_files.read(folder, with_head=(folder / CLASSIFIER_FILE).is_file())
        parameters = {**adapter.arrays, **adapter.head}
    else:
        parameters = huggingface.read(folder)[1]
    weights.check({n: tuple(a.shape) for n, a in parameters.items()}, config, "huggingface", str(folder), stored)
    return parameters


def _from_safetensors(folder: Path) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    file = folder / OPTIMIZER_FILE
    if not file.is_file():
        raise InputError(
            f"{folder} holds no optimizer state ({OPTIMIZER_FILE} or {ORBAX_FOLDER}/); "
            "start a new run from its weights with --init-from"
        )
    try:
        with safe_open(file, "numpy") as stored:
            step = int(stored.metadata()["step"])
            arrays = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({error})") from None
    return step, {
        moment: {n.removeprefix(f"{moment}."): array for n, array in arrays.items() if n.startswith(f"{moment}.")}
        for moment in MOMENTS
    }


def read_back(folder: Path, config: GPTConfig, stored: Sequence[Row] | None = None) -> None:
    """Read the smallest part of what was just written: names and shapes of the weights, and the optimizer's count.

    Args:
        folder: The checkpoint's folder.
        config: Configuration of the model.
        stored: The rows of the parameters in the checkpoint, by default all of the model's.

    Raises:
        InputError: If the files are not those of a checkpoint of this model, although writing them reported no error.
    """
    read_weights(folder, config, stored)
    if (folder / ORBAX_FOLDER).is_dir():
        _load_from_orbax(folder / ORBAX_FOLDER, "step")
        return
    try:
        with safe_open(folder / OPTIMIZER_FILE, "numpy") as optimizer:
            int(optimizer.metadata()["step"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / OPTIMIZER_FILE} cannot be read ({error})") from None


def _from_orbax(
    folder: Path, config: GPTConfig, trainable: Sequence[Row]
) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
    names = weights.shapes(config, "flax", trainable)
    moments = {part: {name: _load_from_orbax(folder, f"{part}.{name}") for name in names} for part in MOMENTS}
    return int(_load_from_orbax(folder, "step")), moments


def _load_from_orbax(folder: Path, name: str) -> np.ndarray:
    try:
        import tensorstore
    except ImportError:
        raise InputError(f"{folder} needs a package to be read: {pip_install('tensorstore')}") from None
    # The layout in which orbax stores an array: zarr inside an OCDBT database; test_checkpoints.py pins it.
    try:
        with plain_path(folder) as plain:
            store = {"driver": "ocdbt", "base": plain.as_uri() + "/", "path": f"{name}/"}
            array = tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()
            return np.asarray(array.read().result())
    except ValueError as error:
        raise InputError(f"{folder}: {name} cannot be read ({str(error).splitlines()[0]})") from None


@contextlib.contextmanager
def plain_path(folder: Path) -> Iterator[Path]:
    """Yield the absolute path of a folder, or of a link to it if orbax would take its own path for a pattern.

    Orbax looks for the parts that it merges with a pattern that begins with the path. It finds none if the path itself
    contains brackets, and reports success. Its store takes a backslash for a separator.
    """
    path = folder.absolute()
    if not re.search(r"[\[\]\\*?]", path.as_posix()):
        yield path
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(path, target_is_directory=True)
        yield link
