"""Which weights a model has: their sha256, and whether they are OpenAI's."""

import hashlib
from pathlib import Path

from parity.errors import InputError
from parity.storage.manifest import file_sha256
from parity.weights.files import huggingface_files, tensorflow_files

OPENAI_WEIGHTS = {
    # OpenAI's model.ckpt.data-00000-of-00001, and model.safetensors of openai-community/gpt2. The hashes of the larger
    # models' files are not published.
    "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118": "124M",
    "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707": "124M",
}
"""{sha256 of a file with weights: size of OpenAI's model}."""


def weights_sha256(path: Path) -> str:
    """Return the sha256 of the file with the weights, in a folder or by itself; of several files, that of their hashes.

    Raises:
        InputError: If the folder holds no weights.
    """
    files = [path]
    if path.is_dir() and tensorflow_files(path):
        files = sorted(path.glob("*.data-?????-of-?????"))
    elif path.is_dir():
        files = huggingface_files(path)
        if files and files[0].name.endswith(".index.json"):
            stem, suffix = files[0].name.removesuffix(".index.json").split(".")
            files = sorted(path.glob(f"{stem}-*-of-*.{suffix}"))
    if not files:
        raise InputError(f"{path} holds no weights")
    if len(files) == 1:
        return file_sha256(files[0])
    lines = "".join(f"{file_sha256(file)}  {file.name}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()
