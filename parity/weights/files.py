"""The files that hold weights in a folder. It may contain one format only, or the older model might be read."""

import mmap
from pathlib import Path

import numpy as np

from parity.errors import InputError

SINGLE = "model.safetensors"
_PICKLE = "pytorch_model.bin"
SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt")
"""Suffixes of files with weights, which may be named in place of a folder."""
CHECKPOINT = "checkpoint"
"""TensorFlow's text file that names the newest of several bundles."""


def huggingface_files(folder: Path) -> list[Path]:
    """Return the file with the weights, or the index of its shards; an empty list if there is neither.

    Raises InputError if both exist. A pytorch_model.bin beside model.safetensors is the same model in the older
    format, and is ignored, as transformers does.
    """
    for name in (SINGLE, _PICKLE):
        present = [file for file in (folder / name, folder / f"{name}.index.json") if file.is_file()]
        if len(present) > 1:
            raise InputError(f"{folder} holds both {present[0].name} and {present[1].name}; delete the older model")
        if present:
            return present
    return []


def tensorflow_files(folder: Path) -> list[Path]:
    """Return the indices of TensorFlow's bundles in a folder, if it is a checkpoint in OpenAI's format."""
    indices = sorted(folder.glob("*.index"))
    named = any(index.name == "model.ckpt.index" for index in indices)
    return indices if named or any((folder / name).is_file() for name in ("hparams.json", CHECKPOINT)) else []


def refuse_other(folder: Path, name: str) -> None:
    """Raise InputError if a folder holds weights in other files than the one that is to be written."""
    present = [*folder.glob(f"{SINGLE}*"), *folder.glob(f"{_PICKLE}*"), *tensorflow_files(folder)]
    if others := sorted(file.name for file in present if file.name != name):
        raise InputError(f"{folder} already holds a model in {others[0]}; name another folder, or delete that model")


def map_file(path: Path) -> np.ndarray:
    """Return the bytes of a file as an array that is read when it is used. Writing to it does not change the file."""
    with path.open("rb") as file:
        if not path.stat().st_size:  # which cannot be mapped
            return np.empty(0, np.uint8)
        return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY), np.uint8)
