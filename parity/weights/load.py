"""Weights by size or folder, in whichever format they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.config import SIZES, GPTConfig
from parity.errors import InputError
from parity.storage.manifest import check_weights
from parity.storage.paths import user_path
from parity.weights import files, huggingface, openai
from parity.weights.table import check


def find_folder(path: str | Path) -> Path:
    """Find a folder or file with weights.

    Args:
        path: A folder, a file, or the size of one of OpenAI's models ("124M", ...), which is downloaded if necessary.

    Raises:
        InputError: If there is no such folder or file, or the download fails.
    """
    if str(path) in SIZES:
        from parity.weights.openai_files import download_model  # here, because it brings an HTTP client

        return download_model(str(path))
    path = user_path(path)
    if not path.is_dir() and not (path.is_file() and path.suffix in files.SUFFIXES):
        raise InputError(
            f"{path} is not a folder with weights; name one, or one of {', '.join(SIZES)}, "
            f"or a file ending in {', '.join(files.SUFFIXES)}"
        )
    return path


def read_folder(path: str | Path) -> tuple[GPTConfig, Mapping[str, Any], str]:
    """Read weights by size, folder or file.

    OpenAI's folders have hparams.json and model.ckpt.*; those of Hugging Face and our own checkpoints have
    config.json and model.safetensors.

    Args:
        path: As for `find_folder`.

    Returns:
        The configuration, the weights by name, and the name of their format. The names and shapes are those of the
        configuration. A tensor is read when it is used.

    Raises:
        InputError: If a file is missing, is damaged or differs from its manifest, the weights do not fit the
            configuration, or the folder holds weights in neither or both of the formats; the message names the file.
    """
    path = find_folder(path)
    if path.is_dir():
        check_weights(path)
    bundles = files.tensorflow_files(path) if path.is_dir() else []
    others = files.huggingface_files(path) if path.is_dir() else []
    if bundles and others:
        raise InputError(
            f"{path} holds two models, in {bundles[0].name} and in {others[0].name}; move one to another folder"
        )
    if bundles or (path.is_dir() and not others and (path / openai.HPARAMS_FILE).exists()):
        config, weights = openai.read(path)
        format = "openai"
    else:
        config, weights, format = huggingface.read(path)
    check({name: tuple(tensor.shape) for name, tensor in weights.items()}, config, format, str(path))
    return config, weights, format
