"""Paths and switches as people write them on command lines and in environment variables."""

import hashlib
import os
import platform
from pathlib import Path

from platformdirs import user_cache_path

from parity.errors import InputError

_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


def user_path(path: str | Path) -> Path:
    """Return a path in which a leading `~` or `~name` is the home folder, unless there is no such user.

    A shell expands it only at the beginning of a word: neither in `--run=~/x` nor in a quoted or configured value.
    """
    return Path(os.path.expanduser(path))


def cache_folder() -> Path:
    """Return GPT_PARITY_CACHE if it is set, otherwise the platform's cache folder for gpt-parity."""
    return user_path(os.environ.get("GPT_PARITY_CACHE") or user_cache_path("gpt-parity"))


def compiled_folder() -> Path:
    """Return the folder of the programs that JAX compiles on processors like this one.

    A program for the instructions of one processor may crash on another, with which it may share a home folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    features = next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.processor())
    name = hashlib.sha256(features.encode()).hexdigest()[:8]
    return cache_folder() / "compiled" / f"{platform.machine()}-{name}"


def is_offline() -> bool:
    """Return whether GPT_PARITY_OFFLINE forbids downloads.

    Raises:
        InputError: For a value that means neither yes nor no.
    """
    value = os.environ.get("GPT_PARITY_OFFLINE", "").strip().lower()
    if value not in (*_TRUE, *_FALSE):
        raise InputError(
            f"GPT_PARITY_OFFLINE={value}: set it to one of {', '.join(_TRUE)} to forbid downloads, "
            f"or to one of {', '.join(filter(None, _FALSE))} to allow them"
        )
    return value in _TRUE
