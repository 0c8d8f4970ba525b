"""Locks of folders and files that only one process may write."""

import contextlib
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import filelock

from parity.errors import InputError

LOCK = ".lock"
"""Name of the file in the folder. It stays there: deleting it could give two processes a lock each."""


def lock_folder(folder: Path, in_use: Callable[[], str]) -> filelock.BaseFileLock | None:
    """Lock a folder until the returned lock is released or the process ends; see lock_file()."""
    return lock_file(folder / LOCK, in_use)


def lock_file(path: Path, in_use: Callable[[], str]) -> filelock.BaseFileLock | None:
    """Take the lock that a file stands for, until it is released or the process ends.

    Args:
        path: The file, which is empty and stays.
        in_use: Called if another process has the lock; returns the message for the user.

    Returns:
        The lock; None, after a warning, on a file system without locks.

    Raises:
        InputError: If another process has the lock.
    """
    lock = filelock.FileLock(path)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(in_use()) from None
    except NotImplementedError:
        warnings.warn(f"{path.parent} cannot be locked; let no second process write it", stacklevel=4)
        return None
    return lock


@contextlib.contextmanager
def waiting_lock(path: Path) -> Iterator[None]:
    """Hold the lock that a file stands for, once no other thread or process has it.

    A file system without locks gives none; what is done in the context must then only waste work if it is done twice.
    """
    lock = filelock.FileLock(path)
    with contextlib.suppress(NotImplementedError):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()
