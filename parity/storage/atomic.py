"""Atomic file writes: a file is either complete or absent."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that names none, as those of writing and closing do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(target: Path, text: str) -> None:
    """Write a UTF-8 file under another name, flush it to disk, and rename it."""
    part = target.with_name(target.name + ".part")
    with named_errors(part), part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.replace(target)


def sync(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with named_errors(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
