"""OpenAI's GPT-2 checkpoints: hparams.json and a TensorFlow tensor bundle, read and written without TensorFlow."""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError, install_extras
from parity.storage.json import read_object
from parity.weights import files
from parity.weights.table import check_dtype, enumerate_some, shapes
from parity.weights.tensor_bundle import read_bundle, write_bundle

PREFIX = "model.ckpt"
HPARAMS_FILE = "hparams.json"
_HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_DROPPED = ("drop_rate", "eos_id")  # not used by the trained model, which is the same function without them


def read(folder: Path, reader: Literal["native", "tensorflow"] = "native") -> tuple[GPTConfig, dict[str, Any]]:
    """Read a folder with hparams.json and a checkpoint, as OpenAI published it or as training left it.

    Of several checkpoints, the one that TensorFlow's file `checkpoint` names is read. What training stores beside the
    weights, such as the optimizer's slots and counters, is left out, with a warning that names it.

    Args:
        folder: The folder.
        reader: "native" reads the index now and each tensor when it is used. "tensorflow" reads all tensors now
            with TensorFlow (extra `tf`), as a second opinion.

    Returns:
        The configuration and {OpenAI's name: tensor}.

    Raises:
        InputError: If a file is missing or damaged, or it is unclear which checkpoint is meant; the message names it.
    """
    config = read_hparams(folder / HPARAMS_FILE)
    prefix = folder / _newest(folder)
    tensors = dict(read_bundle(prefix)) if reader == "native" else read_with_tensorflow(prefix)
    expected = shapes(config, "openai")
    others = [name for name in tensors if name not in expected and not _is_weight(name, expected)]
    if others:
        text = enumerate_some(others)
        warnings.warn(f"{prefix}: the weights are read, but not what training left beside them: {text}", stacklevel=3)
    weights = {name: tensor for name, tensor in tensors.items() if name not in set(others)}
    for name, tensor in weights.items():
        check_dtype(name, tensor.dtype, str(prefix))
    return config, weights


def _is_weight(name: str, expected: Mapping[str, Any]) -> bool:
    """Whether a variable that GPT-2 does not have is one of the model's, and not of its training.

    An optimizer's variables are outside `model/`, or their names begin with the name of their weight: model/wte/Adam.
    """
    parts = name.split("/")
    ancestors = ("/".join(parts[:count]) for count in range(1, len(parts)))
    return parts[0] == "model" and not any(ancestor in expected for ancestor in ancestors)


def _newest(folder: Path) -> str:
    """The prefix of the checkpoint that the file `checkpoint` names, or of the only one."""
    present = [index.name.removesuffix(".index") for index in files.tensorflow_files(folder)]
    try:
        with (folder / files.CHECKPOINT).open("rb") as file:
            text = file.read(2**16).decode("utf-8", errors="replace")
    except FileNotFoundError:
        text = ""
    except OSError as error:
        raise InputError(f"{folder / files.CHECKPOINT} cannot be read ({error.strerror})") from None
    if named := re.search(r'^\s*model_checkpoint_path: "([^"\n]*)"', text, re.MULTILINE):
        name = re.split(r"[/\\]", named[1])[-1]  # a path of the machine that it was trained on
        if name not in present:
            raise InputError(f"{folder / files.CHECKPOINT} names the checkpoint {name!r:.200}, which is not beside it")
        return name
    if len(present) > 1:
        raise InputError(
            f"{folder} holds the checkpoints {enumerate_some(present)}, and no file `{files.CHECKPOINT}` that says "
            "which is the newest; move all but one to another folder"
        )
    return present[0] if present else PREFIX


def read_with_tensorflow(prefix: Path) -> dict[str, np.ndarray]:
    """Return {name: array} of a bundle as TensorFlow reads it, on the CPU; raises InputError that names the bundle."""
    try:
        import tensorflow as tf
    except ImportError:
        raise InputError(
            f"the tensorflow reader needs the extra tf: {install_extras('tf')}; or use the native reader"
        ) from None
    tf.config.set_visible_devices([], "GPU")
    try:
        checkpoint = tf.train.load_checkpoint(str(prefix))
        return {name: checkpoint.get_tensor(name) for name in checkpoint.get_variable_to_shape_map()}
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        text = str(error).splitlines()[0][:200]
        raise InputError(f"{prefix}: TensorFlow cannot read it ({text}); download the checkpoint again") from None


def write(folder: Path, config: GPTConfig, arrays: Mapping[str, np.ndarray]) -> None:
    """Write hparams.json, the file `checkpoint` and a bundle, which TensorFlow and OpenAI's code load.

    The dropout rate is not written: it is a setting of training, and OpenAI's files have no place for it.

    Args:
        folder: The folder, which is made if it does not exist.
        config: Configuration of the model.
        arrays: The weights in the openai format.

    Raises:
        InputError: If the configuration differs from GPT-2 in anything else that hparams.json cannot hold; the
            message names it, and nothing is written. Also if the folder holds other weights.
    """
    lost = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.name not in (*_HPARAMS, *_DROPPED) and getattr(config, field.name) != field.default
    ]
    if lost:
        raise InputError(
            f"{folder}: OpenAI's hparams.json cannot hold {', '.join(lost)}; convert to another format instead"
        )
    files.refuse_other(folder, f"{PREFIX}.index")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / HPARAMS_FILE).write_text(json.dumps(hparams(config)))
    lines = (f'{key}: "{PREFIX}"\n' for key in ("model_checkpoint_path", "all_model_checkpoint_paths"))
    (folder / files.CHECKPOINT).write_text("".join(lines))
    write_bundle(folder / PREFIX, arrays)


def hparams(config: GPTConfig) -> dict[str, int]:
    """Return the entries of OpenAI's hparams.json for a configuration."""
    return {name: getattr(config, name) for name in _HPARAMS}


def read_hparams(path: Path) -> GPTConfig:
    """Read the configuration in OpenAI's hparams.json; raises InputError that names the file."""
    entries = read_object(path)
    missing = [name for name in _HPARAMS if name not in entries]
    if missing:
        raise InputError(f"{path} is not OpenAI's hparams.json: it lacks {', '.join(missing)}")
    if unknown := sorted(entries.keys() - set(_HPARAMS)):  # OpenAI's code refuses them as well
        raise InputError(f"{path}: {enumerate_some(unknown)} is not supported; GPT-2 has {', '.join(_HPARAMS)}")
    try:
        return GPTConfig(**{name: entries[name] for name in _HPARAMS})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
