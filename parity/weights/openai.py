"""OpenAI's GPT-2 checkpoints: hparams.json and a TensorFlow tensor bundle, read and written without TensorFlow."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights.tensor_bundle import read_bundle, write_bundle

PREFIX = "model.ckpt"
_HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_DROPPED = ("drop_rate",)  # used in training only: the trained model is the same function without it


def read(folder: Path, reader: Literal["native", "tensorflow"] = "native") -> tuple[GPTConfig, dict[str, Any]]:
    """Read a folder with hparams.json and model.ckpt.*.

    Args:
        folder: The folder.
        reader: "native" reads the index now and each tensor when it is used. "tensorflow" reads all tensors now
            with TensorFlow (extra `tf`), as a second opinion.

    Returns:
        The configuration and {OpenAI's name: tensor}.

    Raises:
        InputError: If a file is missing or damaged; the message names it.
    """
    config = read_hparams(folder / "hparams.json")
    if reader == "native":
        return config, dict(read_bundle(folder / PREFIX))
    return config, read_with_tensorflow(folder / PREFIX)


def read_with_tensorflow(prefix: Path) -> dict[str, np.ndarray]:
    """{name: array} of a bundle as TensorFlow reads it on the CPU; raises InputError that names the bundle."""
    try:
        import tensorflow as tf
    except ImportError:
        raise InputError(
            "the tensorflow reader needs the tf extra: pip install -e '.[tf]'; or use the native reader"
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
            message names it, and nothing is written.
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
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams(config)))
    lines = (f'{key}: "{PREFIX}"\n' for key in ("model_checkpoint_path", "all_model_checkpoint_paths"))
    (folder / "checkpoint").write_text("".join(lines))
    write_bundle(folder / PREFIX, arrays)


def hparams(config: GPTConfig) -> dict[str, int]:
    """The entries of OpenAI's hparams.json for a configuration."""
    return {name: getattr(config, name) for name in _HPARAMS}


def read_hparams(path: Path) -> GPTConfig:
    """Read the configuration in OpenAI's hparams.json; raises InputError that names the file."""
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    missing = [name for name in _HPARAMS if not isinstance(entries, dict) or name not in entries]
    if missing:
        raise InputError(f"{path} is not OpenAI's hparams.json: it lacks {', '.join(missing)}")
    try:
        return GPTConfig(**{name: entries[name] for name in _HPARAMS})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
