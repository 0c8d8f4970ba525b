"""Weights from a folder of any known kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity import huggingface, openai_checkpoint
from parity.config import GPTConfig
from parity.download import SIZES, download_model
from parity.errors import InputError


def read(path: str | Path) -> tuple[GPTConfig, Mapping[str, Any], str]:
    """(configuration, weights, their format) of a folder, or of one of OpenAI's models by its size.

    A size ("124M", ...) is downloaded into the cache where it is not there yet. OpenAI's folders have
    hparams.json and model.ckpt.*; Hugging Face's and our checkpoints config.json and model.safetensors.
    Raises InputError where the folder is neither, or damaged.
    """
    folder = download_model(str(path)) if str(path) in SIZES else Path(path)
    if not folder.is_dir():
        raise InputError(
            f"{folder} is no folder with OpenAI's or Hugging Face's files, and not one of {', '.join(SIZES)}"
        )
    if (folder / "hparams.json").exists() or (folder / f"{openai_checkpoint.PREFIX}.index").exists():
        return *openai_checkpoint.read(folder), "openai"
    return huggingface.read(folder)
