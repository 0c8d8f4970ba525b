"""Checkpoint folders, each either complete or absent, with a manifest of hashes that shows later damage.

checkpoints/000500/ holds what the backend wrote after step 500, and manifest.json, which maps the name of every
file to its sha256. The folder is written under another name, and renamed once all of it is on disk.
"""

import errno
import hashlib
import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

from parity.errors import InputError
from parity.storage.atomic import sync
from parity.training.processes import ALONE, Processes

MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished-"


def step_folder(checkpoints: Path, step: int) -> Path:
    """Return the path of a step's folder, whether or not it exists."""
    return checkpoints / f"{step:06d}"


def save(
    checkpoints: Path,
    step: int,
    write: Callable[[Path], None],
    keep: int,
    keep_every: int | None = None,
    best: int | None = None,
    processes: Processes = ALONE,
) -> Path:
    """Write the checkpoint of a step, and delete older ones that are not to be kept.

    All processes of a run call this and write their part; the first one publishes the folder.

    Args:
        checkpoints: The folder of all checkpoints of the run.
        step: The number of steps made.
        write: Called with an empty folder, which it fills.
        keep: Number of newest checkpoints to keep.
        keep_every: Checkpoints of steps that it divides are kept as well.
        best: The checkpoint of this step is kept as well.
        processes: The processes of the run.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: If the disk has no room for it or refuses a write; earlier checkpoints stay as they were.
    """
    target, unfinished = step_folder(checkpoints, step), checkpoints / f"{_UNFINISHED}{step:06d}"
    try:
        if processes.first:
            checkpoints.mkdir(parents=True, exist_ok=True)
            for leftover in checkpoints.glob(f"{_UNFINISHED}*"):  # of a process that was killed
                shutil.rmtree(leftover)
            unfinished.mkdir()
        processes.barrier()
        write(unfinished)
        processes.barrier()
        if processes.first:
            (unfinished / MANIFEST).write_text(json.dumps(_hashes(unfinished), indent=1) + "\n")
            _flush(unfinished)
            if target.exists():
                shutil.rmtree(target)
            unfinished.rename(target)
            sync(checkpoints)
    except OSError as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"checkpoint {target} could not be written ({error}); earlier checkpoints are intact. "
            "Free some disk space, then continue with --resume"
        ) from error
    if processes.first:
        for old in steps(checkpoints)[:-keep]:
            if old != best and not (keep_every and old % keep_every == 0):
                shutil.rmtree(step_folder(checkpoints, old))
    processes.barrier()
    return target


def require_space(folder: Path, size: int) -> None:
    """Raise OSError unless the disk has room for `size` bytes: a save should fail before it writes, not halfway."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free", str(folder))


def steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a folder, in ascending order."""
    return sorted(int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit())


def newest_intact(checkpoints: Path) -> Path:
    """Return the newest step folder that matches its manifest, with a warning for each newer one that does not.

    Raises:
        InputError: If there is none.
    """
    for step in reversed(steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        if not (damage := _damage(folder)):
            return folder
        warnings.warn(f"checkpoint {folder} is skipped: {damage}", stacklevel=2)
    raise InputError(f"{checkpoints} holds no intact checkpoint; was the run stopped before its first evaluation?")


def intact(checkpoints: Path, step: int) -> Path:
    """Return the folder of a step.

    Raises:
        InputError: If it is missing or damaged; the message says which.
    """
    folder = step_folder(checkpoints, step)
    if not folder.is_dir():
        raise InputError(
            f"{checkpoints} has no step {step}; it has {', '.join(map(str, steps(checkpoints))) or 'none'}"
        )
    if damage := _damage(folder):
        raise InputError(f"checkpoint {folder} is damaged: {damage}")
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    hashes = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                hashes[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return hashes


def _damage(folder: Path) -> str:
    """Describe how a step folder differs from its manifest; an empty text if it does not."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    hashes = _hashes(folder)
    changed = sorted(name for name in expected if hashes.get(name) != expected[name])
    return f"missing or altered: {', '.join(changed)}" if changed else ""


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
