"""Hugging Face's folders with config.json and model.safetensors, which are also the form of our own checkpoints.

The keys of config.json are those of transformers' GPT2Config, and two of our own: qkv_bias and weights_format.
transformers keeps keys that it does not know, and ignores them.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights.lazy import LazyTensor
from parity.weights.table import FORMATS

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_PREFIX = "transformer."
_FORMAT = "weights_format"
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
# Keys that change the function that a model computes, and their value in GPT-2.
_REQUIRED = {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "model_type": "gpt2",
    "scale_attn_by_inverse_layer_idx": False,
    "scale_attn_weights": True,
}
# The dtype that each dtype of safetensors is read as.
_DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype("f8"),
    "F32": np.dtype("f4"),
    "F16": np.dtype("f4"),
    "BF16": np.dtype("f4"),
}


def config_to_dict(config: GPTConfig) -> dict[str, Any]:
    """The entries of config.json of transformers' GPT2LMHeadModel for a configuration."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        **_REQUIRED,
        "vocab_size": config.n_vocab,
        "n_positions": config.n_ctx,
        "n_embd": config.n_embd,
        "n_head": config.n_head,
        "n_layer": config.n_layer,
        "n_inner": None,
        **dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), config.drop_rate),
        **dict.fromkeys(("bos_token_id", "eos_token_id"), config.n_vocab - 1),
        "tie_word_embeddings": config.tied_head,
        "qkv_bias": config.qkv_bias,
    }


def config_from_dict(entries: Mapping[str, Any], origin: str) -> GPTConfig:
    """The configuration that the entries of a config.json describe.

    Of transformers' three dropout rates, that of the residual branches is used for all.

    Args:
        entries: The entries of config.json.
        origin: Path of the file, for messages.

    Raises:
        InputError: If an entry is missing, out of range, or describes another architecture.
    """
    for key, value in _REQUIRED.items():
        if entries.get(key, value) != value:
            raise InputError(f"{origin}: {key} is {entries[key]!r}, which is not supported; GPT-2 has {value!r}")
    try:
        return GPTConfig(
            n_vocab=entries["vocab_size"],
            n_ctx=entries["n_positions"],
            n_embd=entries["n_embd"],
            n_head=entries["n_head"],
            n_layer=entries["n_layer"],
            drop_rate=entries.get("resid_pdrop", 0.0),
            qkv_bias=entries.get("qkv_bias", True),
            tied_head=entries.get("tie_word_embeddings", True),
        )
    except KeyError as error:
        raise InputError(f"{origin}: {error} is missing; is this the config.json of a GPT-2?") from None


def write(folder: Path, config: GPTConfig, arrays: Mapping[str, np.ndarray], format: str = "huggingface") -> None:
    """Write config.json and model.safetensors.

    Args:
        folder: The folder, which is made if it does not exist.
        config: Configuration of the model.
        arrays: The weights, in `format`.
        format: The format of the names: "huggingface", which transformers opens, or "torch" or "flax", the names
            of our own models.

    Raises:
        InputError: If config.json cannot hold the configuration; the message names what it would lose.
    """
    restored = config_from_dict(config_to_dict(config), str(folder / CONFIG_FILE))
    lost = [
        f"{field.name}={getattr(config, field.name)!r}"
        for field in dataclasses.fields(config)
        if getattr(restored, field.name, field.default) != getattr(config, field.name)
    ]
    if lost:
        raise InputError(f"{folder}: config.json cannot hold {', '.join(lost)}")
    folder.mkdir(parents=True, exist_ok=True)
    prefix = _PREFIX if format == "huggingface" else ""
    named = {n if n == "lm_head.weight" else prefix + n: a for n, a in arrays.items()}
    save_tensors(folder / WEIGHTS_FILE, named, {"format": "pt"})
    entries = {**config_to_dict(config), _FORMAT: format}
    (folder / CONFIG_FILE).write_text(json.dumps(entries, indent=2) + "\n")


def save_tensors(file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file; raises OSError if the disk refuses it."""
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, metadata)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


def read(path: str | Path) -> tuple[GPTConfig, dict[str, LazyTensor], str]:
    """Read a folder with config.json and model.safetensors, in one file or several shards.

    Names may have the prefix `transformer.`. The mask buffers attn.bias and attn.masked_bias, which are not
    parameters, are skipped, and so is a tied head that is stored a second time.

    Args:
        path: The folder.

    Returns:
        The configuration, the weights by name, and the name of their format. A tensor is read when it is used;
        16-bit floats become float32.

    Raises:
        InputError: If a file is missing, damaged or does not describe a GPT-2; the message names it.
    """
    folder = Path(path)
    config_path = folder / CONFIG_FILE
    entries = _read_json(config_path)
    config = config_from_dict(entries, str(config_path))
    format = entries.get(_FORMAT, "huggingface")
    if format not in FORMATS:
        raise InputError(f"{config_path}: {_FORMAT} is {format!r}, not one of {', '.join(FORMATS)}")
    tensors: dict[str, LazyTensor] = {}
    for file in _weight_files(folder):
        for name, tensor in _tensors(file).items():
            if name in tensors:
                raise InputError(f"{file}: {name} is stored a second time; save the model again")
            tensors[name] = tensor
    head, embedding = tensors.get("lm_head.weight"), tensors.get("wte.weight")
    if config.tied_head and head is not None and embedding is not None and head.shape == embedding.shape:
        if not np.array_equal(np.asarray(head), np.asarray(embedding)):
            raise InputError(f"{folder}: lm_head differs from wte, but {CONFIG_FILE} says that they are tied")
        del tensors["lm_head.weight"]
    return config, tensors, format


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names, which must be files of the same folder."""
    single, index = folder / WEIGHTS_FILE, folder / f"{WEIGHTS_FILE}.index.json"
    if single.is_file():
        return [single]
    if not index.is_file():
        raise InputError(f"{single} is missing; give a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    names = _read_json(index).get("weight_map")
    if not isinstance(names, dict) or not names:
        raise InputError(f"{index} has no weight_map")
    shards = sorted(set(map(str, names.values())))
    for shard in shards:
        if Path(shard).name != shard:
            raise InputError(f"{index} names the shard {shard!r}, which is not a file beside it")
        if not (folder / shard).is_file():
            raise InputError(f"{folder / shard} is missing, and {index.name} names it")
    return [folder / shard for shard in shards]


def _tensors(path: Path) -> dict[str, LazyTensor]:
    """{name without prefix: tensor} of the parameters in a safetensors file."""
    tensors: dict[str, LazyTensor] = {}
    try:
        with safe_open(path, "numpy") as file:
            for stored_name in file.keys():  # noqa: SIM118
                name = stored_name.removeprefix(_PREFIX)
                if _BUFFER.fullmatch(name):
                    continue
                entry = file.get_slice(stored_name)
                dtype = _DTYPES.get(entry.get_dtype())
                if dtype is None:
                    known = ", ".join(_DTYPES)
                    raise InputError(f"{path}: {name} has dtype {entry.get_dtype()}; weights must be one of {known}")
                if name in tensors:
                    raise InputError(f"{path}: {name} is stored a second time; save the model again")
                read = functools.partial(_read_tensor, path, stored_name)
                tensors[name] = LazyTensor(name, tuple(entry.get_shape()), dtype, read)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); download or save it again") from None
    return tensors


def _read_tensor(path: Path, name: str) -> np.ndarray:
    with safe_open(path, "numpy") as file:
        return file.get_tensor(name)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); give a folder with {CONFIG_FILE}") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(entries, dict):
        raise InputError(f"{path} must hold a JSON object")
    return entries
