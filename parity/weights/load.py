"""Weights from a folder of any known kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import huggingface, openai


def find_folder(path: str | Path) -> Path:
    """The folder at `path`, or that of one of OpenAI's models by its size ("124M", ...), downloaded if need be.

    Raises InputError where there is none.
    """
    from parity.weights.openai_files import SIZES, download_model  # here, because it brings an HTTP client

    folder = download_model(str(path)) if str(path) in SIZES else Path(path)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder with OpenAI's or Hugging Face's files, and not one of {', '.join(SIZES)}"
        )
    return folder


def read_folder(path: str | Path) -> tuple[GPTConfig, Mapping[str, Any], str]:
    """(configuration, weights, their format) of what find_folder finds.

    OpenAI's folders have hparams.json and model.ckpt.*; Hugging Face's and our checkpoints config.json and
    model.safetensors. Raises InputError where the folder is neither, or damaged.
    """
    folder = find_folder(path)
    if (folder / "hparams.json").exists() or (folder / f"{openai.PREFIX}.index").exists():
        return *openai.read(folder), "openai"
    return huggingface.read(folder)
