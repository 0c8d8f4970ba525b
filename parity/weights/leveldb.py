"""LevelDB's table format: sorted keys and their values in prefix-compressed blocks, each with a crc32c.

Source: LevelDB's doc/table_format.md. Every length is checked before it is used.
"""

import struct
from collections.abc import Iterator

import google_crc32c
import numpy as np

_FOOTER, _TRAILER = 48, 5
_MAGIC = 0xDB4775248B80FB57
_RESTART_EVERY = 16


class DamageError(Exception):
    """Raised for a damaged file. The message says what is wrong; the caller adds the name of the file."""


def read_table(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of the whole table, in order; raises DamageError."""
    if len(data) < _FOOTER:
        raise DamageError(f"{len(data)} bytes are fewer than its footer has")
    if struct.unpack("<Q", data[-8:])[0] != _MAGIC:
        raise DamageError("it does not end with the magic number of a table")
    footer = data[-_FOOTER:-8]
    _, place = _handle(footer, 0)  # skips the metaindex, which is empty in tensor bundles
    index, _ = _handle(footer, place)
    last = None
    for _, value in _block(data, index):
        handle, _ = _handle(value, 0)
        for key, entry in _block(data, handle):
            if last is not None and key <= last:
                raise DamageError(f"the name {key!r} is out of order or repeated")
            last = key
            yield key, entry


def _handle(data: bytes, place: int) -> tuple[tuple[int, int], int]:
    """Decode a block handle; return ((offset, size), place after it)."""
    offset, place = read_varint(data, place)
    size, place = read_varint(data, place)
    return (offset, size), place


def _block(data: bytes, handle: tuple[int, int]) -> Iterator[tuple[bytes, bytes]]:
    """Yield (key, value) of one block, after checking its crc32c."""
    offset, size = handle
    if offset + size + _TRAILER > len(data) - _FOOTER or size < 4:
        raise DamageError(f"a block of {size} bytes at {offset} is outside the file")
    block, block_type = data[offset : offset + size], data[offset + size]
    [crc] = struct.unpack("<I", data[offset + size + 1 : offset + size + _TRAILER])
    if masked_crc(data[offset : offset + size + 1]) != crc:
        raise DamageError(f"the block at byte {offset} does not match its crc32c")
    if block_type:
        raise DamageError(f"the block at byte {offset} is compressed (type {block_type}), which is not supported")
    [restarts] = struct.unpack("<I", block[-4:])
    end = size - 4 - 4 * restarts
    if end < 0:
        raise DamageError(f"the block at byte {offset} claims {restarts} restarts")
    place, key = 0, b""
    while place < end:
        shared, place = read_varint(block, place)
        own, place = read_varint(block, place)
        length, place = read_varint(block, place)
        if shared > len(key) or place + own + length > end:
            raise DamageError(f"an entry of the block at byte {offset} is longer than the block")
        key = key[:shared] + block[place : place + own]
        place += own
        yield key, block[place : place + length]
        place += length


def write_table(entries: list[tuple[bytes, bytes]]) -> bytes:
    """Write a table of one data block, an empty metaindex, an index and the footer; `entries` are sorted."""
    table = b""
    handles: list[bytes] = []
    for block in (entries, [], None):
        if block is None:
            block = [(entries[-1][0] + b"\0", handles[0])]
        content = _write_block(block) + b"\0"  # block type 0: not compressed
        handles.append(encode_varint(len(table)) + encode_varint(len(content) - 1))
        table += content + struct.pack("<I", masked_crc(content))
    return table + (handles[1] + handles[2]).ljust(_FOOTER - 8, b"\0") + struct.pack("<Q", _MAGIC)


def _write_block(entries: list[tuple[bytes, bytes]]) -> bytes:
    content, restarts, last = b"", [0], b""
    for number, (key, value) in enumerate(entries):
        shared = 0
        if number % _RESTART_EVERY:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        elif number:
            restarts.append(len(content))
        content += b"".join(map(encode_varint, (shared, len(key) - shared, len(value)))) + key[shared:] + value
        last = key
    return content + struct.pack(f"<{len(restarts)}I", *restarts) + struct.pack("<I", len(restarts))


def masked_crc(data: bytes | np.ndarray) -> int:
    """Return LevelDB's masked crc32c, rotated and offset so that data may contain checksums of its own parts."""
    crc = google_crc32c.value(data)
    return (((crc >> 15) | (crc << 17)) + 0xA282EAD8) & 0xFFFFFFFF


def read_varint(data: bytes, place: int) -> tuple[int, int]:
    """Decode the variable-length integer at `place`; return (value, place after it)."""
    value = 0
    for shift in range(0, 70, 7):
        if place >= len(data):
            break
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise DamageError("a variable-length integer does not end")


def encode_varint(value: int) -> bytes:
    """Encode a non-negative integer with 7 bits per byte, the lowest bits first."""
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*encoded, value])
