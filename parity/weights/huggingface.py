"""Hugging Face's folders with config.json and model.safetensors, which are also the form of our own checkpoints."""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.config import GPTConfig
from parity.errors import InputError, printable
from parity.storage import manifest
from parity.storage.atomic import replace_text
from parity.storage.json import LISTING, read_object
from parity.weights import files, names
from parity.weights.classifier import HEAD
from parity.weights.hf_config import config_from_dict, config_to_dict
from parity.weights.lazy import LazyTensor
from parity.weights.pickles import read_pickle
from parity.weights.table import FORMATS, OUT_HEAD, ROWS

CONFIG_FILE, WEIGHTS_FILE = "config.json", files.SINGLE
_PREFIX = "transformer."
_HEADS = (OUT_HEAD, f"{HEAD}.")  # which transformers keeps outside of `transformer`
_FORMAT = "weights_format"
# The dtype in which each dtype of safetensors is stored, and the one that it is read as.
_DTYPES: dict[str, tuple[np.dtype, np.dtype]] = {
    "F64": (np.dtype("<f8"), np.dtype("f8")),
    "F32": (np.dtype("<f4"), np.dtype("f4")),
    "F16": (np.dtype("<f2"), np.dtype("f4")),
    "BF16": (np.dtype(ml_dtypes.bfloat16), np.dtype("f4")),
}


def write(
    folder: Path,
    config: GPTConfig,
    arrays: Mapping[str, np.ndarray],
    format: str = "huggingface",
    eos_id: int | None = None,
    entries: Mapping[str, Any] = MappingProxyType({}),
) -> None:
    """Write config.json and model.safetensors.

    Args:
        folder: The folder, which is made if it does not exist.
        config: Configuration of the model.
        arrays: The weights, in `format`.
        format: The format of the names: "huggingface", which transformers opens, or "torch" or "flax", the names
            of our own models.
        eos_id: The tokenizer's end-of-text id; see `parity.weights.hf_config.end_of_text_id`.
        entries: Entries of config.json that replace those of a language model, or are added to them.

    Raises:
        InputError: If config.json cannot hold the configuration; the message names what it would lose. Also if the
            folder holds weights in other files, which would then compete with these.
    """
    restored = config_from_dict(config_to_dict(config), str(folder / CONFIG_FILE))
    lost = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if field.compare and getattr(restored, field.name, field.default) != getattr(config, field.name)
    ]
    if lost:
        raise InputError(f"{folder}: config.json cannot hold {', '.join(lost)}")
    files.refuse_other(folder, WEIGHTS_FILE)
    manifest.forget(folder)
    folder.mkdir(parents=True, exist_ok=True)
    prefix = _PREFIX if format == "huggingface" else ""
    named = {n if n.startswith(_HEADS) else prefix + n: a for n, a in arrays.items()}
    save_tensors(folder / WEIGHTS_FILE, named, {"format": "pt"})
    entries = {**config_to_dict(config, eos_id), **entries, _FORMAT: format}
    replace_text(folder / CONFIG_FILE, json.dumps(entries, indent=2) + "\n")


def save_tensors(file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file, with the permissions of any new file; raises OSError if the disk refuses it."""
    existed = file.exists()
    file.touch()
    mode = file.stat().st_mode & 0o777  # what the umask leaves; safetensors itself allows nobody else to read
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, metadata)
    except SafetensorError as error:
        if not existed:
            file.unlink(missing_ok=True)
        raise OSError(f"{file}: {error}") from error
    if len(metadata) > 1:
        _sort_metadata(file)
    file.chmod(mode)


def _sort_metadata(file: Path) -> None:
    """Write the metadata in the header of a safetensors file in alphabetical order, which the library does not keep."""
    with file.open("r+b") as stream:
        size = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        stream.seek(8)
        stream.write(text.ljust(size))


def read(path: str | Path) -> tuple[GPTConfig, dict[str, LazyTensor], str]:
    """Read config.json and the weights beside it.

    The weights are model.safetensors or pytorch_model.bin, each in one file or several shards with an index, or a file
    of either kind that is named. Names may have the prefixes of wrappers (see parity.weights.names); masks, which are
    not parameters, are skipped. A tied head may be stored in place of the token embedding, or a second time. A model of
    the notebook is read too, and needs no config.json if it has the shape of one of OpenAI's.

    Args:
        path: The folder, or a file with weights.

    Returns:
        The configuration, the weights by name, and the name of their format. A tensor is read when it is used;
        16-bit floats become float32.

    Raises:
        InputError: If a file is missing, damaged or does not describe a GPT-2; the message names it.
    """
    path = Path(path)
    config_path = (path if path.is_dir() else path.parent) / CONFIG_FILE
    if (adapter := config_path.with_name("adapter_config.json")).is_file():
        raise InputError(
            f"{adapter}: these weights have an adapter beside them; move it to a folder of its own and give that as "
            "--adapter, or delete it"
        )
    if not config_path.exists() and not path.is_dir():
        entries, config, given_format = {}, None, None
    else:
        entries = read_object(config_path, hint=f"give a folder with {CONFIG_FILE}")
        config = config_from_dict(entries, str(config_path))
        given_format = entries.get(_FORMAT)
        if given_format is not None and given_format not in [*FORMATS]:
            raise InputError(f"{config_path}: {_FORMAT} is {given_format!r:.80}, not one of {', '.join(FORMATS)}")
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(path) if path.is_dir() else [path]:
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise InputError(f"{file}: {printable(name, 120)} is stored a second time; save the model again")
            tensors[name] = tensor
    names.refuse_nanogpt(tensors, str(path))
    tensors = names.join_query_key_value(tensors)
    format = given_format or names.format_of(tensors)
    if config is None:
        config = names.notebook_config(tensors, str(path))
    return config, _with_one_head(tensors, config, format, str(path)), format


def _with_one_head(
    tensors: dict[str, LazyTensor], config: GPTConfig, format: str, origin: str
) -> dict[str, LazyTensor]:
    """Return the tensors without a tied head, which may be stored instead of the token embedding or beside it."""
    [head_row] = [row for row in ROWS if row.huggingface == OUT_HEAD]
    head_name, embedding_name = head_row.name(format), ROWS[0].name(format)
    same_axes = head_row.axes[format] == ROWS[0].axes[format]
    head, embedding = tensors.get(head_name or ""), tensors.get(embedding_name or "")
    if not config.tied_head or head is None or not same_axes:
        return tensors
    if embedding is not None and (
        head.shape != embedding.shape or not np.array_equal(np.asarray(head), np.asarray(embedding), equal_nan=True)
    ):
        reason = f"{head_name} differs from {embedding_name}, but {CONFIG_FILE} says that they are tied"
        raise InputError(f"{origin}: {reason}")
    others = {name: tensor for name, tensor in tensors.items() if name != head_name}
    return {embedding_name or "": head, **others}


def _weight_files(folder: Path) -> list[Path]:
    """The file with the weights, or the shards that an index names, which must be files of the same folder."""
    present = files.huggingface_files(folder)
    if not present:
        raise InputError(f"{folder / WEIGHTS_FILE} is missing; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    [file] = present
    if file.suffix != ".json":
        return [file]
    weight_map = read_object(file, LISTING).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{file} has no weight_map")
    shards = sorted(set(map(str, weight_map.values())))
    for shard in shards:
        if Path(shard).name != shard:
            raise InputError(f"{file} names the shard {_short(shard)}, which is not a file beside it")
        if not (folder / shard).is_file():
            raise InputError(f"{folder / printable(shard, 120)} is missing, and {file.name} names it")
    return [folder / shard for shard in shards]


def _short(name: str) -> str:
    return repr(printable(name, 120))


def _tensors(path: Path) -> dict[str, LazyTensor]:
    """{name without prefix: tensor} of the parameters in a file of safetensors or of PyTorch."""

    def parameters(stored: Iterable[str]) -> dict[str, str]:
        return names.unique(names.without_prefixes(stored), str(path))

    if path.suffix == ".safetensors":
        return read_tensors(path, parameters)[0]
    return read_pickle(path, parameters)


def read_tensors(
    path: Path, rename: Callable[[Iterable[str]], dict[str, str]] | None = None
) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return {name: tensor} of a safetensors file, and the file's metadata.

    Args:
        path: The file.
        rename: Returns {name: name in the file} of the tensors to read, given the names in the file. By default all
            are read under their own names.

    Raises:
        InputError: If the file is damaged, or one of these tensors does not hold floating-point numbers.
    """
    try:
        with safe_open(path, "numpy") as file:  # checks the header, and that the tensors fill the file
            entries = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 (it is not a dict)
            metadata = file.metadata() or {}
        starts = _starts(files.map_file(path))
    except (SafetensorError, OSError) as error:
        text = printable(str(error), 300)
        raise InputError(f"{path} cannot be read as safetensors ({text}); download or save it again") from None
    tensors: dict[str, LazyTensor] = {}
    for name, stored_name in (rename(entries) if rename else {name: name for name in entries}).items():
        kind, shape = entries[stored_name].get_dtype(), tuple(entries[stored_name].get_shape())
        if kind not in _DTYPES:
            known = ", ".join(_DTYPES)
            raise InputError(f"{path}: {printable(name, 120)} has dtype {kind}; weights must be one of {known}")
        stored_dtype, dtype = _DTYPES[kind]
        read = functools.partial(_read_tensor, path, starts[stored_name], stored_dtype, shape)
        tensors[name] = LazyTensor(name, shape, dtype, read)
    return tensors, metadata


def _read_tensor(path: Path, start: int, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(files.map_file(path), dtype, math.prod(shape), start).reshape(shape)


def _starts(content: np.ndarray) -> dict[str, int]:
    """Return the place of each tensor's first byte in a valid file of safetensors."""
    size = int.from_bytes(content[:8].tobytes(), "little")
    header = json.loads(content[8 : 8 + size].tobytes())
    return {name: 8 + size + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"}
