"""OpenAI's GPT-2 checkpoints: TensorFlow tensor bundles read and written with NumPy alone.

A bundle is `model.ckpt.index`, a table in LevelDB's format from names to small protocol buffers
(dtype, shape, shard, offset, size, crc32c), and `model.ckpt.data-*`, the tensors' little-endian bytes.
Sources: TensorFlow's core/protobuf/tensor_bundle.proto and
core/util/tensor_bundle. Nothing is trusted: every length is checked before it is used, every block and
tensor against its checksum, and shards have names made here, never names from a file.
"""

import dataclasses
import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np

from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights.leveldb import DamageError, encode_varint, masked_crc, read_table, read_varint, write_table

PREFIX = "model.ckpt"
_HPARAMS = ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer")
_MOST_INDEX_BYTES = 64 * 2**20  # 1558M has 21 kB
# types.proto; GPT-2 is float32, and the others are what such a file may also hold.
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    9: np.dtype("<i8"),
    19: np.dtype("<f2"),
}
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class StoredTensor:
    """A tensor that is still on the disk; np.asarray(...) reads it and checks its checksum."""

    name: str
    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        with self.path.open("rb") as file:
            file.seek(self.offset)
            data = file.read(math.prod(self.shape) * self.dtype.itemsize)
        if masked_crc(data) != self.crc:
            raise InputError(f"{self.path}: {self.name} is damaged (its crc32c differs); fetch the file again")
        return np.frombuffer(data, self.dtype).reshape(self.shape).astype(dtype or self.dtype, copy=False)


def read(folder: Path, reader: Literal["native", "tensorflow"] = "native") -> tuple[GPTConfig, dict[str, Any]]:
    """(configuration, {OpenAI's name: tensor}) of a folder with hparams.json and model.ckpt.*.

    The native reader reads the index only; a tensor is read when it is used. "tensorflow" is the second
    opinion, arrays read by TensorFlow (extra `tf`). Raises InputError that names the file.
    """
    config = read_hparams(folder / "hparams.json")
    if reader == "native":
        return config, dict(read_bundle(folder / PREFIX))
    return config, read_with_tensorflow(folder / PREFIX)


def read_with_tensorflow(prefix: Path) -> dict[str, np.ndarray]:
    """{name: array} of a bundle as TensorFlow reads it, on the CPU; raises InputError that names it."""
    try:
        import tensorflow as tf
    except ImportError:
        raise InputError(
            "the tensorflow reader needs the tf extra: pip install -e '.[tf]'; or use the native one"
        ) from None
    tf.config.set_visible_devices([], "GPU")
    try:
        found = tf.train.load_checkpoint(str(prefix))
        return {name: found.get_tensor(name) for name in found.get_variable_to_shape_map()}
    except (tf.errors.OpError, ValueError, IndexError, RuntimeError) as error:
        text = str(error).splitlines()[0][:200]
        raise InputError(f"{prefix}: TensorFlow cannot read it ({text}); fetch the checkpoint again") from None


def write(folder: Path, config: GPTConfig, arrays: Mapping[str, np.ndarray]) -> None:
    """Write hparams.json, the `checkpoint` file and a bundle that TensorFlow and OpenAI's code load."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "hparams.json").write_text(json.dumps(hparams(config)))
    lines = (f'{key}: "{PREFIX}"\n' for key in ("model_checkpoint_path", "all_model_checkpoint_paths"))
    (folder / "checkpoint").write_text("".join(lines))
    write_bundle(folder / PREFIX, arrays)


def hparams(config: GPTConfig) -> dict[str, int]:
    """What OpenAI's hparams.json says of a configuration."""
    return {name: getattr(config, name) for name in _HPARAMS}


def read_hparams(path: Path) -> GPTConfig:
    """The configuration in OpenAI's hparams.json."""
    try:
        entries = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error})") from None
    missing = [name for name in _HPARAMS if not isinstance(entries, dict) or name not in entries]
    if missing:
        raise InputError(f"{path} is not OpenAI's hparams.json: it lacks {', '.join(missing)}")
    try:
        return GPTConfig(**{name: entries[name] for name in _HPARAMS})
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def read_bundle(prefix: Path) -> dict[str, StoredTensor]:
    """{name: tensor} of `prefix`.index and its data shards; raises InputError that names the file."""
    index = prefix.with_name(prefix.name + ".index")
    try:
        size = index.stat().st_size
        if size > _MOST_INDEX_BYTES:
            raise DamageError(f"{size} bytes are too many for an index")
        entries = list(read_table(index.read_bytes()))
        return _tensors(entries, prefix)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None
    except DamageError as error:
        raise InputError(f"{index} is no intact tensor bundle: {error}; fetch the checkpoint again") from None


def write_bundle(prefix: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {name: array} as one shard and its index; the bytes are those of the arrays."""
    entries = [(b"", _varint_field(1, 1) + _message_field(3, _varint_field(1, 1)))]  # one shard, version 1
    offset = 0
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as data:
        for name in sorted(arrays, key=str.encode):
            array = np.asarray(arrays[name])
            little = array.dtype.newbyteorder("<")
            if little not in _CODES:
                raise InputError(f"{name}: a bundle holds {[str(d) for d in _CODES]}, not {array.dtype}")
            content = array.astype(little, copy=False).tobytes()
            data.write(content)
            dims = b"".join(_message_field(2, _varint_field(1, dim)) for dim in array.shape)
            entry = _varint_field(1, _CODES[little]) + _message_field(2, dims)
            entry += (_varint_field(4, offset) if offset else b"") + _varint_field(5, len(content))
            entry += bytes([6 << 3 | 5]) + struct.pack("<I", masked_crc(content))
            entries.append((name.encode(), entry))
            offset += len(content)
    prefix.with_name(f"{prefix.name}.index").write_bytes(write_table(entries))


def _tensors(entries: list[tuple[bytes, bytes]], prefix: Path) -> dict[str, StoredTensor]:
    if not entries or entries[0][0] != b"":
        raise DamageError("it has no header")
    header = _message(entries[0][1])
    shards = _integer(header, 1)
    if _integer(header, 2):
        raise DamageError("it is big-endian")
    if not 1 <= shards <= 99_999:
        raise DamageError(f"it claims {shards} shards")
    sizes: dict[Path, int] = {}
    tensors: dict[str, StoredTensor] = {}
    for key, value in entries[1:]:
        try:
            name = key.decode()
        except UnicodeDecodeError:
            raise DamageError(f"the name {key!r} is not UTF-8") from None
        fields = _message(value)
        if 7 in fields:
            raise DamageError(f"{name} is partitioned, which GPT-2's variables are not")
        dtype = _DTYPES.get(_integer(fields, 1))
        if dtype is None:
            raise DamageError(f"{name} has TensorFlow's dtype {_integer(fields, 1)}, not one of floats and integers")
        shape = _shape(name, fields)
        shard, offset, size = (_integer(fields, number) for number in (3, 4, 5))
        if shard >= shards:
            raise DamageError(f"{name} is in shard {shard} of {shards}")
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
        if path not in sizes:
            sizes[path] = path.stat().st_size
        if size != math.prod(shape) * dtype.itemsize:
            raise DamageError(f"{name} of shape {list(shape)} has {size} bytes")
        if offset + size > sizes[path]:
            raise DamageError(f"{name} ends at byte {offset + size}, but {path.name} has {sizes[path]}")
        [crc] = fields.get(6, [None])[-1:]
        if not isinstance(crc, bytes) or len(crc) != 4:
            raise DamageError(f"{name} has no crc32c")
        tensors[name] = StoredTensor(name, path, offset, shape, dtype, struct.unpack("<I", crc)[0])
    return tensors


def _shape(name: str, fields: dict[int, list[int | bytes]]) -> tuple[int, ...]:
    """Dimensions of the TensorShapeProto in field 2."""
    [encoded] = fields.get(2, [b""])[-1:]
    if not isinstance(encoded, bytes):
        raise DamageError(f"{name} has no shape")
    dims = []
    for part in _message(encoded).get(2, []):
        if not isinstance(part, bytes):
            raise DamageError(f"{name} has no shape")
        dims.append(_integer(_message(part), 1))
    if len(dims) > 8 or any(dim >= 2**40 for dim in dims):
        raise DamageError(f"{name} has the absurd shape {dims}")
    return tuple(dims)


# Protocol buffers


def _message(data: bytes) -> dict[int, list[int | bytes]]:
    """{field number: values}: integers, or bytes for lengths and fixed widths."""
    fields: dict[int, list[int | bytes]] = {}
    place = 0
    while place < len(data):
        tag, place = read_varint(data, place)
        value: int | bytes
        if tag & 7 == 0:
            value, place = read_varint(data, place)
        elif tag & 7 in (1, 2, 5):
            if tag & 7 == 2:
                length, place = read_varint(data, place)
            else:
                length = 8 if tag & 7 == 1 else 4
            if place + length > len(data):
                raise DamageError("a field is longer than its message")
            value, place = data[place : place + length], place + length
        else:
            raise DamageError(f"a field has wire type {tag & 7}")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _integer(fields: dict[int, list[int | bytes]], number: int) -> int:
    [value] = fields.get(number, [0])[-1:]
    if not isinstance(value, int):
        raise DamageError(f"field {number} is no integer")
    return value


def _varint_field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + encode_varint(value)


def _message_field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + encode_varint(len(content)) + content
