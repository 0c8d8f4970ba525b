"""Hugging Face's folder, config.json and model.safetensors, in and out: our own checkpoints too.

Keys: transformers' GPT2Config. Two keys of ours stand beside them, qkv_bias and weights_format;
transformers keeps what it does not know without acting on it.
"""

import dataclasses
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
from parity.weights import FORMATS

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_PREFIX = "transformer."
_FORMAT = "weights_format"
_BUFFER = re.compile(r"h\.\d+\.attn\.(masked_)?bias")
_REQUIRED = {"activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "model_type": "gpt2"}


def config_to_dict(config: GPTConfig) -> dict[str, Any]:
    """config.json of transformers' GPT2LMHeadModel for this configuration."""
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
    """The configuration that a config.json describes; raises InputError for another architecture."""
    for key, value in _REQUIRED.items():
        if entries.get(key, value) != value:
            raise InputError(f"{origin}: {key} is {entries[key]!r}; GPT-2 has {value!r}")
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
    """Write config.json and model.safetensors; `arrays` are in a format of parity/weights.py.

    transformers opens the huggingface format; torch's and flax's carry the names of our models.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prefix = _PREFIX if format == "huggingface" else ""
    named = {n if n == "lm_head.weight" else prefix + n: a for n, a in arrays.items()}
    save_tensors(folder / WEIGHTS_FILE, named, {"format": "pt"})
    entries = {**config_to_dict(config), _FORMAT: format}
    (folder / CONFIG_FILE).write_text(json.dumps(entries, indent=2) + "\n")


def save_tensors(file: Path, arrays: Mapping[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write a safetensors file; raises OSError where the disk does not take it."""
    try:
        save_file({name: np.ascontiguousarray(array) for name, array in arrays.items()}, file, metadata)
    except SafetensorError as error:
        raise OSError(f"{file}: {error}") from error


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still in its file; np.asarray(...) reads it, 16-bit floats as float32."""

    name: str
    path: Path
    shape: tuple[int, ...]
    kind: str
    """safetensors' dtype: F32, F16, BF16, ..."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        if self.kind == "BF16":  # NumPy has none: the upper half of a float32
            array = (self._raw(np.uint16).astype(np.uint32) << 16).view(np.float32)
        else:
            with safe_open(self.path, "numpy") as file:
                array = file.get_tensor(self.name)
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        return array.astype(dtype or array.dtype, copy=False)

    def _raw(self, dtype: Any) -> np.ndarray:
        with self.path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            begin, end = json.loads(file.read(length))[self.name]["data_offsets"]
            file.seek(8 + length + begin)
            return np.frombuffer(file.read(end - begin), dtype).reshape(self.shape)


def read(path: str | Path) -> tuple[GPTConfig, dict[str, StoredTensor], str]:
    """(configuration, weights, their format) of a folder, one file or sharded.

    Names may carry the `transformer.` prefix or not; the mask buffers attn.bias and attn.masked_bias, which
    are no parameters, are left out by name. Tensors are read when they are used. Raises InputError that
    names the file.
    """
    folder = Path(path)
    config_path = folder / CONFIG_FILE
    entries = _read_json(config_path)
    config = config_from_dict(entries, str(config_path))
    format = entries.get(_FORMAT, "huggingface")
    if format not in FORMATS:
        raise InputError(f"{config_path}: {_FORMAT} is {format!r}, not one of {', '.join(FORMATS)}")
    stored: dict[str, StoredTensor] = {}
    for file in _weight_files(folder):
        for tensor in _tensors(file):
            name = tensor.name.removeprefix(_PREFIX)
            if _BUFFER.fullmatch(name):
                continue
            if name in stored:
                raise InputError(f"{tensor.path}: {name} is there twice, also in {stored[name].path.name}")
            stored[name] = tensor
    head, embedding = stored.get("lm_head.weight"), stored.get("wte.weight")
    if config.tied_head and head is not None and embedding is not None and head.shape == embedding.shape:
        if not np.array_equal(np.asarray(head), np.asarray(embedding)):
            raise InputError(f"{head.path}: lm_head differs from wte, but {config_path} says that they are tied")
        del stored["lm_head.weight"]  # a tied head stored twice
    return config, stored, format


def _weight_files(folder: Path) -> list[Path]:
    """model.safetensors, or the shards that its index names; a shard is a file of this folder."""
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


def _tensors(path: Path) -> list[StoredTensor]:
    try:
        with safe_open(path, "numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            return [StoredTensor(n, path, tuple(s.get_shape()), s.get_dtype()) for n, s in slices.items()]
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read as safetensors ({error}); fetch or save it again") from None


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
