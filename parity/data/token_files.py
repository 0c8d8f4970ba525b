"""Memory-mapped .bin token files, in nanoGPT's format (uint16) and llm.c's (a header of 256 int32, then uint16)."""

from pathlib import Path

import numpy as np

from parity.errors import InputError

# llm.c dev/data/data_common.py
_LLMC_MAGIC, _LLMC_VERSION, _LLMC_HEADER = 20240520, 1, 256 * 4


def bin_header(count: int) -> bytes:
    """Return the header of an llm.c .bin file with `count` uint16 tokens."""
    header = np.zeros(_LLMC_HEADER // 4, "<i4")
    header[:3] = _LLMC_MAGIC, _LLMC_VERSION, count
    return header.tobytes()


def read_bin(path: str | Path) -> np.ndarray:
    """Memory-map the tokens of a .bin file, uint16 [length]; raises InputError for a missing or damaged file."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"token file {path} is missing")
    size = path.stat().st_size
    header = np.fromfile(path, np.int32, count=3) if size >= _LLMC_HEADER else np.zeros(3, np.int32)
    if header[0] == _LLMC_MAGIC:
        if header[1] != _LLMC_VERSION:
            raise InputError(f"token file {path} has llm.c version {header[1]}; only {_LLMC_VERSION} is supported")
        if size != _LLMC_HEADER + 2 * int(header[2]):
            raise InputError(f"token file {path} is truncated or damaged: its header states {header[2]} tokens")
        if header[2] == 0:
            raise InputError(f"token file {path} contains no tokens")
        return np.memmap(path, np.uint16, mode="r", offset=_LLMC_HEADER)
    if size == 0 or size % 2:
        raise InputError(f"token file {path} has {size} bytes; a file of uint16 tokens has a positive, even number")
    return np.memmap(path, np.uint16, mode="r")
