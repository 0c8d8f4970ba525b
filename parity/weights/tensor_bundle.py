"""TensorFlow's tensor bundles, read and written with NumPy alone.

A bundle is `PREFIX.index`, a LevelDB table from tensor names to protocol buffers (dtype, shape, shard, offset,
size, crc32c), and `PREFIX.data-*`, the tensors' little-endian bytes. Sources: TensorFlow's
core/protobuf/tensor_bundle.proto and core/util/tensor_bundle.

No file is trusted: every length is checked before it is used, every block and tensor is checked against its
checksum, and the names of the shards are made here and never taken from a file.
"""

import dataclasses
import functools
import math
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path

import ml_dtypes
import numpy as np

from parity.errors import InputError, printable
from parity.weights.files import map_file
from parity.weights.lazy import LazyTensor
from parity.weights.leveldb import DamageError, encode_varint, masked_crc, read_table, read_varint, write_table

_MAX_INDEX_BYTES = 64 * 2**20  # the index of the 1558M model has 21 kB
# TensorFlow's types.proto. GPT-2 is float32; a bundle may also hold the others. Tensors of further kinds, such as
# the text that describes a TensorFlow 2 object, have the dtype _OPAQUE and cannot be read.
_DTYPES: dict[int, np.dtype] = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    9: np.dtype("<i8"),
    14: np.dtype(ml_dtypes.bfloat16),
    19: np.dtype("<f2"),
}
_OPAQUE = np.dtype("V1")
_CODES = {dtype: code for code, dtype in _DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Entry:
    """Where a tensor is stored, according to the index."""

    name: str
    path: Path
    offset: int
    """In bytes."""
    size: int
    """In bytes."""
    shape: tuple[int, ...]
    dtype: np.dtype
    crc: int
    """Masked crc32c of the tensor's bytes."""


def read_bundle(prefix: Path) -> dict[str, LazyTensor]:
    """Return {name: tensor} of a bundle; a tensor is read, and its checksum verified, when it is used.

    Raises InputError that names the file.
    """
    return {
        name: LazyTensor(name, entry.shape, entry.dtype, functools.partial(_read_tensor, entry))
        for name, entry in read_index(prefix).items()
    }


def _read_tensor(entry: Entry) -> np.ndarray:
    if entry.dtype is _OPAQUE:
        raise InputError(f"{entry.path}: {printable(entry.name, 120)} has a dtype that is not supported")
    return _checked_bytes(entry, entry.path).view(entry.dtype).reshape(entry.shape)


def _checked_bytes(entry: Entry, path: Path) -> np.ndarray:
    content = map_file(path)[entry.offset : entry.offset + entry.size]
    if masked_crc(content) != entry.crc:
        raise InputError(f"{path}: {printable(entry.name, 120)} is damaged (its crc32c differs); download it again")
    return content


def check_shard(path: Path, entries: Iterable[Entry]) -> None:
    """Check every tensor of a shard against its checksum in the index; raises InputError that names the first bad one.

    Args:
        path: The shard, which may still have another name than the index says.
        entries: The entries of the index that are in this shard.
    """
    for entry in entries:
        _checked_bytes(entry, path)


def read_index(prefix: Path) -> dict[str, Entry]:
    """Return {name: entry} of `prefix`.index, checked against the sizes of the shards; raises InputError."""
    index = prefix.with_name(prefix.name + ".index")
    entries = parse_index(index, prefix)
    try:
        sizes = {path: path.stat().st_size for path in {entry.path for entry in entries.values()}}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None
    for entry in entries.values():
        end = entry.offset + entry.size
        if end > sizes[entry.path]:
            place = f"{printable(entry.name, 120)} ends at byte {end}"
            raise _not_intact(index, f"{place}, but {entry.path.name} has {sizes[entry.path]}")
    return entries


def parse_index(index: Path, prefix: Path) -> dict[str, Entry]:
    """Return {name: entry} of an index, without looking at the shards, which are called `prefix`.data-*.

    Raises InputError that names the index.
    """
    try:
        size = index.stat().st_size
        if size > _MAX_INDEX_BYTES:
            raise DamageError(f"{size} bytes are too many for an index")
        return _parse_index(list(read_table(index.read_bytes())), prefix)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read ({error.strerror})") from None
    except DamageError as error:
        raise _not_intact(index, str(error)) from None


def _not_intact(index: Path, problem: str) -> InputError:
    return InputError(f"{index} is not an intact tensor bundle: {problem}; download the checkpoint again")


def write_bundle(prefix: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write {name: array} as one shard and its index.

    Raises InputError for a dtype that a bundle cannot hold.
    """
    entries = [(b"", _varint_field(1, 1) + _message_field(3, _varint_field(1, 1)))]  # header: one shard, version 1
    offset = 0
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with prefix.with_name(f"{prefix.name}.data-00000-of-00001").open("wb") as data:
        for name in sorted(arrays, key=str.encode):
            array = np.asarray(arrays[name])
            little = array.dtype.newbyteorder("<")
            if little not in _CODES:
                raise InputError(f"{name}: a tensor bundle holds {[str(d) for d in _CODES]}, not {array.dtype}")
            content = array.astype(little, copy=False).tobytes()
            data.write(content)
            dims = b"".join(_message_field(2, _varint_field(1, dim)) for dim in array.shape)
            entry = _varint_field(1, _CODES[little]) + _message_field(2, dims)
            entry += (_varint_field(4, offset) if offset else b"") + _varint_field(5, len(content))
            entry += bytes([6 << 3 | 5]) + struct.pack("<I", masked_crc(content))
            entries.append((name.encode(), entry))
            offset += len(content)
    prefix.with_name(f"{prefix.name}.index").write_bytes(write_table(entries))


def _parse_index(table: list[tuple[bytes, bytes]], prefix: Path) -> dict[str, Entry]:
    if not table or table[0][0] != b"":
        raise DamageError("it has no header")
    header = decode_message(table[0][1])
    shards = _integer(header, 1)
    if _integer(header, 2):
        raise DamageError("it is big-endian")
    if not 1 <= shards <= 99_999:
        raise DamageError(f"it claims {shards} shards")
    entries: dict[str, Entry] = {}
    for key, value in table[1:]:
        try:
            name = key.decode()
        except UnicodeDecodeError:
            raise DamageError(f"the name {key!r} is not UTF-8") from None
        fields = decode_message(value)
        if 7 in fields:
            raise DamageError(f"{name} is partitioned, which GPT-2's variables are not")
        dtype = _DTYPES.get(_integer(fields, 1), _OPAQUE)
        shape = _shape(name, fields)
        shard, offset, size = (_integer(fields, number) for number in (3, 4, 5))
        if shard >= shards:
            raise DamageError(f"{name} is in shard {shard} of {shards}")
        path = prefix.with_name(f"{prefix.name}.data-{shard:05d}-of-{shards:05d}")
        if dtype is not _OPAQUE and size != math.prod(shape) * dtype.itemsize:
            raise DamageError(f"{name} of shape {list(shape)} has {size} bytes")
        [crc] = fields.get(6, [None])[-1:]
        if not isinstance(crc, bytes) or len(crc) != 4:
            raise DamageError(f"{name} has no crc32c")
        entries[name] = Entry(name, path, offset, size, shape, dtype, struct.unpack("<I", crc)[0])
    return entries


def _shape(name: str, fields: dict[int, list[int | bytes]]) -> tuple[int, ...]:
    """Decode the dimensions of the TensorShapeProto in field 2."""
    [encoded] = fields.get(2, [b""])[-1:]
    if not isinstance(encoded, bytes):
        raise DamageError(f"{name} has no shape")
    dims = []
    for part in decode_message(encoded).get(2, []):
        if not isinstance(part, bytes):
            raise DamageError(f"{name} has no shape")
        dims.append(_integer(decode_message(part), 1))
    if len(dims) > 8 or any(dim >= 2**40 for dim in dims):
        raise DamageError(f"{name} has the absurd shape {dims}")
    return tuple(dims)


# Protocol buffers


def decode_message(data: bytes) -> dict[int, list[int | bytes]]:
    """Decode a protocol buffer; return {field number: values}, which are integers for varints, otherwise bytes."""
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
        raise DamageError(f"field {number} is not an integer")
    return value


def _varint_field(number: int, value: int) -> bytes:
    return bytes([number << 3]) + encode_varint(value)


def _message_field(number: int, content: bytes) -> bytes:
    return bytes([number << 3 | 2]) + encode_varint(len(content)) + content
