"""Locks of folders that only one process may write."""

import warnings
from collections.abc import Callable
from pathlib import Path

import filelock

from parity.errors import InputError

LOCK = ".lock"
"""Name of the file in the folder. It stays there: deleting it could give two processes a lock each."""


def lock_folder(folder: Path, in_use: Callable[[], str]) -> filelock.BaseFileLock | None:
    """Lock a folder until the returned lock is released or the process ends.

    Args:
        folder: The folder.
        in_use: Called if another process has locked the folder; returns the message for the user.

    Returns:
        The lock; None, after a warning, on a file system without locks.

    Raises:
        InputError: If another process has locked the folder.
    """
    lock = filelock.FileLock(folder / LOCK)
    try:
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise InputError(in_use()) from None
    except NotImplementedError:
        warnings.warn(f"{folder} cannot be locked; let no second process write it", stacklevel=3)
        return None
    return lock
