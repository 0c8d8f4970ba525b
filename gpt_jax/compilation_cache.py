"""JAX's persistent compilation cache, which the scripts enable; importing gpt_jax does not."""

import contextlib
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import filelock
import jax

from parity.errors import printable
from parity.storage.paths import compiled_folder

_MOST_BYTES = 2 * 1024**3  # JAX deletes the programs that have not been used for longest
_LEAST_SECONDS = 0.1  # programs that compile faster are not kept
_LEAST_FREE = 200e6  # bytes on the disk, without which nothing is kept


def enable_compilation_cache(enabled: bool = True, n_processes: int = 1) -> None:
    """Keep the programs that this process compiles in a folder, for the next process that runs the same ones.

    The folder is JAX_COMPILATION_CACHE_DIR, which is used as JAX itself uses it, or `compiled_folder()`, whose size is
    limited. Several processes have no cache without that variable: only the first one writes, so the folder must be
    on storage that all of them share. JAX_ENABLE_COMPILATION_CACHE=0 disables it, like `enabled`.

    A folder that cannot be written, or a full disk, is one warning on standard error. JAX's own errors with a cache are
    warnings as well.

    Args:
        enabled: Whether to have a cache at all.
        n_processes: Number of processes of the run.
    """
    config: Any = jax.config
    if not (enabled and config.jax_enable_compilation_cache):
        config.update("jax_enable_compilation_cache", False)
        return
    chosen = config.jax_compilation_cache_dir
    if chosen is None and n_processes > 1:
        return
    folder = compiled_folder() if chosen is None else Path(chosen)
    obstacle = "" if "://" in str(folder) else _obstacle(folder, is_limited=chosen is None)
    if obstacle:
        line = f"warning: compiled programs are not kept in {folder} ({obstacle}); JAX_COMPILATION_CACHE_DIR moves them"
        sys.stderr.write(f"{printable(line, 1000)}\n")
    if obstacle or chosen is None:  # of XLA's own cache, an error ends the compilation, and the size is not limited
        _set("jax_persistent_cache_enable_xla_caches", "none")
    if not obstacle and chosen is None:
        _set("jax_compilation_cache_max_size", _MOST_BYTES)
        _set("jax_persistent_cache_min_compile_time_secs", _LEAST_SECONDS)
        config.update("jax_compilation_cache_dir", str(folder))


def _set(name: str, value: Any) -> None:
    """Set an option of JAX, unless its environment variable does."""
    if name.upper() not in os.environ:
        jax.config.update(name, value)


def _obstacle(folder: Path, is_limited: bool) -> str:
    """Make the folder; return why nothing can be kept in it, or an empty text."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what is in it is executed
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
        if is_limited:  # JAX then takes this lock to read and write, and times of use belong to the programs
            with contextlib.suppress(filelock.Timeout), filelock.FileLock(folder / ".lockfile", timeout=1):
                _remove_unfinished(folder)
    except (OSError, NotImplementedError) as error:
        return getattr(error, "strerror", None) or str(error)
    return f"only {free / 1e6:.0f} MB are free on the disk" if free < _LEAST_FREE else ""


def _remove_unfinished(folder: Path) -> None:
    """Remove programs whose writing was interrupted: JAX would neither replace them nor write any others."""
    for program in folder.glob("*-cache"):
        if not program.with_name(f"{program.name.removesuffix('-cache')}-atime").exists():
            program.unlink()
