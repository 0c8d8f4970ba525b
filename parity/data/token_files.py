"""Memory-mapped .bin token files, in nanoGPT's format (uint16) and llm.c's (a header of 256 int32, then uint16)."""

import functools
from pathlib import Path
from typing import Protocol

import numpy as np

from parity.errors import InputError

# llm.c dev/data/data_common.py
_LLMC_MAGIC, _LLMC_VERSION, _LLMC_HEADER = 20240520, 1, 256 * 4
_MOST_OPEN = 64
"""Number of files that are mapped at once; systems allow a process to open 256 or more."""
# How files of other kinds begin that have the name .bin.
_OTHER_KINDS = {
    b"\x93NUMPY": "an array of NumPy; write its ids with ids.astype('uint16').tofile(PATH)",
    b"PK\x03\x04": "a zip archive, such as the weights that torch.save writes",
    (20240801).to_bytes(4, "little") + b"\x07\0\0\0": "llm.c's format for Llama 3, with ids of 32 bits",
}


class Tokens(Protocol):
    """Token ids that are read in slices: an array [length], or a TokenFile."""

    def __len__(self) -> int:
        """Return the number of ids."""

    def __getitem__(self, part: slice, /) -> np.ndarray:
        """Return the ids of a slice."""


class TokenFile:
    """The token ids of a .bin file, uint16 [length], or of a part of it.

    The file is mapped into memory when a slice is read. At most 64 files are mapped at a time, so that a corpus may
    have any number of them.

    Args:
        path: The file.
        part: The ids to use; by default all.
        id_limit: A number that all ids are known to be below: the vocabulary of the tokenizer that prepared the file.

    Raises:
        InputError: If the file is missing or damaged.
    """

    def __init__(self, path: Path, part: slice = slice(None), id_limit: int | None = None):
        self.path, self.id_limit = path.absolute(), id_limit
        status = path.stat()
        self._version = (status.st_ino, status.st_size, status.st_mtime_ns)
        self._range = range(len(read_bin(path)))[part]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, part: slice) -> np.ndarray:
        chosen = self._range[part]
        # A copy, because a view would keep the file open.
        return np.array(_mapped(self.path, self._version)[chosen.start : chosen.stop : chosen.step])

    def part(self, part: slice) -> "TokenFile":
        """Return a part of the ids, which is not read yet."""
        ids = self._range[part]
        return TokenFile(self.path, slice(ids.start, ids.stop), self.id_limit)


@functools.lru_cache(maxsize=_MOST_OPEN)
def _mapped(path: Path, _version: tuple[int, ...]) -> np.ndarray:
    return read_bin(path)


def bin_header(count: int, n_vocab: int = 0) -> bytes:
    """Return the header of an llm.c .bin file.

    Args:
        count: Number of uint16 tokens.
        n_vocab: Size of the tokenizer's vocabulary, in a place that llm.c leaves empty.
    """
    header = np.zeros(_LLMC_HEADER // 4, "<i4")
    header[:4] = _LLMC_MAGIC, _LLMC_VERSION, count, n_vocab
    return header.tobytes()


def stated_vocabulary(path: Path) -> int | None:
    """Return the size of the vocabulary in the header of a .bin file; None if it states none."""
    header = _header(path)
    return int(header[3]) or None if header[0] == _LLMC_MAGIC else None


def read_bin(path: str | Path) -> np.ndarray:
    """Memory-map the tokens of a .bin file, uint16 [length]; raises InputError for a missing or damaged file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"token file {path} is missing")
    size = path.stat().st_size
    header = _header(path)
    if header[0] == _LLMC_MAGIC:
        if header[1] != _LLMC_VERSION:
            raise InputError(f"token file {path} has llm.c version {header[1]}; only {_LLMC_VERSION} is supported")
        if size != _LLMC_HEADER + 2 * int(header[2]):
            raise InputError(f"token file {path} is truncated or damaged: its header states {header[2]} tokens")
        if header[2] == 0:
            raise InputError(f"token file {path} contains no tokens")
        return np.memmap(path, "<u2", mode="r", offset=_LLMC_HEADER)
    for beginning, kind in _OTHER_KINDS.items():
        if header.tobytes().startswith(beginning):
            raise InputError(f"{path} is {kind}; token files hold ids of 16 bits")
    if path.with_suffix(".idx").exists():
        raise InputError(f"{path} has an index, {path.with_suffix('.idx').name}, and so is not in a supported format")
    if size == 0 or size % 2:
        raise InputError(f"token file {path} has {size} bytes; a file of uint16 tokens has a positive, even number")
    return np.memmap(path, "<u2", mode="r")


def _header(path: Path) -> np.ndarray:
    """Return the first four int32 of a file, filled up with zeros."""
    with path.open("rb") as file:
        data = file.read(16)
    return np.frombuffer(data[:16].ljust(16, b"\0"), "<i4")
