"""Weights by size or folder, in whichever format they are."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.config import SIZES, GPTConfig
from parity.errors import InputError
from parity.storage.manifest import check_weights
from parity.storage.paths import user_path
from parity.weights import files, huggingface, openai, peft_files
from parity.weights.adapters import merged
from parity.weights.classifier import refuse_classifier
from parity.weights.digest import weights_sha256
from parity.weights.peft_files import Adapter
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


def read_folder(path: str | Path, adapter: str | Path | None = None) -> tuple[GPTConfig, Mapping[str, Any], str]:
    """Read weights by size, folder or file.

    OpenAI's folders have hparams.json and model.ckpt.*; those of Hugging Face and our own checkpoints have
    config.json and model.safetensors. A folder with an adapter stands for its base, which it names, with the adapter
    merged.

    Args:
        path: As for `find_folder`.
        adapter: A folder with an adapter, which is merged into the weights.

    Returns:
        The configuration, the weights by name, and the name of their format. The names and shapes are those of the
        configuration. A tensor is read when it is used.

    Raises:
        InputError: If a file is missing, is damaged or differs from its manifest, the weights do not fit the
            configuration, or the folder holds weights in neither or both of the formats; the message names the file.
            Also if the base of an adapter is missing or is not the one that it was trained on.
    """
    if adapter is not None:
        return _merge(read_folder(path), _read_adapter(adapter), str(path))
    path = find_folder(path)
    if holds_adapter(path):
        return merge_adapter(path, _read_adapter(path))
    if path.is_dir():
        refuse_classifier(path)
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


def base_folder(path: Path) -> Path:
    """Return the folder or file of the base that an adapter in a folder names; any other path is returned as it is."""
    if not holds_adapter(path):
        return path
    base = _read_adapter(path).base
    return path if base is None else find_folder(base)


def holds_adapter(path: Path) -> bool:
    """Whether a path is a folder with an adapter alone."""
    return path.is_dir() and (path / peft_files.CONFIG_FILE).is_file() and not files.huggingface_files(path)


def _read_adapter(folder: str | Path) -> Adapter:
    path = user_path(folder)
    if not path.is_dir():
        raise InputError(f"{path} is not a folder with an adapter")
    check_weights(path)
    return peft_files.read(path)


def merge_adapter(folder: Path, adapter: Adapter) -> tuple[GPTConfig, Mapping[str, Any], str]:
    """Read the base that the adapter in a folder names, and merge the adapter; the result is that of read_folder()."""
    both = "give the base as --model, and the adapter as --adapter"
    if adapter.base is None:
        raise InputError(f"{folder} holds an adapter that does not name its base; {both}")
    if user_path(adapter.base).absolute() == folder.absolute():
        raise InputError(f"{folder} holds an adapter that names itself as its base; {both}")
    try:
        base = read_folder(adapter.base)
    except InputError as error:
        raise InputError(
            f"{folder} holds an adapter of the base {adapter.base}, which cannot be read ({error}); if it has moved, "
            f"{both}"
        ) from None
    return _merge(base, adapter, adapter.base)


def _merge(
    base: tuple[GPTConfig, Mapping[str, Any], str], adapter: Adapter, name: str
) -> tuple[GPTConfig, Mapping[str, Any], str]:
    config, arrays, format = base
    adapter.check(config)
    if adapter.base_sha256 not in (None, weights_sha256(config, arrays, format)):
        raise InputError(
            f"{name} has other weights than those that the adapter in {adapter.origin} was trained on "
            f"({adapter.base or 'a base without a name'}, sha256 {adapter.base_sha256}); give that base"
        )
    return config, merged(arrays, format, config, adapter.lora, adapter.arrays), format
