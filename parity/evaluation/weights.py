"""Which weights a model has: their sha256, and whether they are OpenAI's."""

import hashlib
from pathlib import Path
from typing import Any

from parity.storage.manifest import file_sha256
from parity.weights.digest import weights_sha256
from parity.weights.files import huggingface_files, tensorflow_files

OPENAI_WEIGHTS = {
    # OpenAI's model.ckpt.data-00000-of-00001, and model.safetensors of openai-community/gpt2. The hashes of the larger
    # models' files are not published.
    "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118": "124M",
    "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707": "124M",
}
"""{sha256 of a file with weights: size of OpenAI's model}."""


def model_sha256(backend: Any, model: Any, folder: Path, adapter: Path | None = None) -> str:
    """Return the sha256 of the file that a model was loaded from; of several files, that of their hashes.

    Args:
        backend: The package gpt_torch or gpt_jax.
        model: A GPTModel of the backend.
        folder: The folder or file that it was loaded from.
        adapter: The adapter that was merged into it. The sha256 is then that of the merged weights, as it is if
            `folder` holds only an adapter, which names its base.
    """
    sha256 = None if adapter is not None else files_sha256(folder)
    return sha256 or weights_sha256(model.config, backend.export_weights(model))


def files_sha256(path: Path) -> str | None:
    """Return the sha256 of the weights in a folder, or of a file; None for a folder without weights."""
    files = [path]
    if path.is_dir() and tensorflow_files(path):
        files = sorted(path.glob("*.data-?????-of-?????"))
    elif path.is_dir():
        files = huggingface_files(path)
        if files and files[0].name.endswith(".index.json"):
            stem, suffix = files[0].name.removesuffix(".index.json").split(".")
            files = sorted(path.glob(f"{stem}-*-of-*.{suffix}"))
    if not files:
        return None
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
