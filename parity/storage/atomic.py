"""Atomic file writes: a file is either complete or absent."""

import os
from pathlib import Path


def replace_text(target: Path, text: str) -> None:
    """Write a UTF-8 file under another name, flush it to disk, and rename it."""
    part = target.with_suffix(target.suffix + ".part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(target)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
