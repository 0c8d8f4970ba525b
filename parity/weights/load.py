"""Weights by size or folder, in whichever format they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import huggingface, openai


def find_folder(path: str | Path) -> Path:
    """Find a folder with weights.

    Args:
        path: A folder, or the size of one of OpenAI's models ("124M", ...), which is downloaded if necessary.

    Raises:
        InputError: If there is no such folder, or the download fails.
    """
    from parity.weights.openai_files import SIZES, download_model  # here, because it brings an HTTP client

    folder = download_model(str(path)) if str(path) in SIZES else Path(path)
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; give a folder with weights, or one of {', '.join(SIZES)}")
    return folder


def read_folder(path: str | Path) -> tuple[GPTConfig, Mapping[str, Any], str]:
    """Read weights by size or folder.

    OpenAI's folders have hparams.json and model.ckpt.*; those of Hugging Face and our own checkpoints have
    config.json and model.safetensors.

    Args:
        path: As for `find_folder`.

    Returns:
        The configuration, the weights by name, and the name of their format. A tensor is read when it is used.

    Raises:
        InputError: If a file is missing or damaged, or the folder holds neither kind; the message names the file.
    """
    folder = find_folder(path)
    if (folder / "hparams.json").exists() or (folder / f"{openai.PREFIX}.index").exists():
        return *openai.read(folder), "openai"
    return huggingface.read(folder)
