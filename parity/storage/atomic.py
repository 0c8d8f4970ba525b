"""Atomic writes: a file, or a folder of files, is either complete or absent."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from parity.errors import InputError


@contextlib.contextmanager
def named_errors(path: Path) -> Iterator[None]:
    """Name the file in an OSError that names none, as those of writing and closing do."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


def replace_text(target: Path, text: str, shared: bool = False) -> None:
    """Write a UTF-8 file under another name, flush it to disk, and rename it.

    Args:
        target: The file.
        text: Its content.
        shared: Whether several processes may write the file at the same time; the last one to rename prevails.
    """
    part = target.with_name(f"{target.name}.{secrets.token_hex(8)}.part" if shared else f"{target.name}.part")
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


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield a temporary folder, which becomes `target` at the end.

    If the block raises, what it wrote is deleted, and an InputError names the target instead of the temporary folder.

    Args:
        target: A folder that is empty or does not exist yet.
    """
    exists = target.is_dir()  # then its files are moved into it: it may be a mount point, or the working directory
    target.parent.mkdir(parents=True, exist_ok=True)
    stage = (target if exists else target.parent) / f".unfinished-{secrets.token_hex(4)}"
    stage.mkdir()
    try:
        yield stage
        if exists:
            for file in sorted(stage.iterdir()):
                file.replace(target / file.name)
        else:
            stage.rename(target)
    except InputError as error:
        raise InputError(str(error).replace(str(stage), str(target))) from None
    finally:
        shutil.rmtree(stage, ignore_errors=True)
