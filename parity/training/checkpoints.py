"""Step folders that are whole or not there, with a manifest of sha256 that says which.

checkpoints/000500/ holds whatever the backend wrote, and manifest.json, which lists every file. It
is written under another name and renamed when all of it is on the disk.
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
    """Let `write(folder)` fill a folder, publish it as the step's, and drop those not to be kept.

    Kept are the newest `keep`, those of steps divisible by `keep_every`, and the step `best`. All `processes` of
    a run come here and write; the first does the rest. Raises InputError where the disk does not take it;
    checkpoints saved before are left as they were.
    """
    target, unfinished = step_folder(checkpoints, step), checkpoints / f"{_UNFINISHED}{step:06d}"
    try:
        if processes.first:
            checkpoints.mkdir(parents=True, exist_ok=True)
            for left in checkpoints.glob(f"{_UNFINISHED}*"):  # by a process that was killed
                shutil.rmtree(left)
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
            "Make room, then go on with --resume"
        ) from error
    if processes.first:
        for old in steps(checkpoints)[:-keep]:
            if old != best and not (keep_every and old % keep_every == 0):
                shutil.rmtree(step_folder(checkpoints, old))
    processes.barrier()
    return target


def require_space(folder: Path, size: int) -> None:
    """Raise OSError unless the disk has room for `size` bytes: better said before a save than in its middle."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free", str(folder))


def steps(checkpoints: Path) -> list[int]:
    """Steps that have a folder, ascending."""
    return sorted(int(path.name) for path in checkpoints.glob("[0-9]*") if path.name.isdigit())


def newest_intact(checkpoints: Path) -> Path:
    """The newest step folder whose files are all as they were written; warns of others passed over.

    Raises InputError where there is none.
    """
    for step in reversed(steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        if not (damage := _damage(folder)):
            return folder
        warnings.warn(f"checkpoint {folder} is passed over: {damage}", stacklevel=2)
    raise InputError(f"{checkpoints} holds no intact checkpoint; was the run stopped before its first evaluation?")


def intact(checkpoints: Path, step: int) -> Path:
    """The folder of a step; raises InputError, saying why, where it is missing or damaged."""
    folder = step_folder(checkpoints, step)
    if not folder.is_dir():
        raise InputError(
            f"{checkpoints} has no step {step}; it has {', '.join(map(str, steps(checkpoints))) or 'none'}"
        )
    if damage := _damage(folder):
        raise InputError(f"checkpoint {folder} is damaged: {damage}")
    return folder


def _hashes(folder: Path) -> dict[str, str]:
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path != folder / MANIFEST:
            with path.open("rb") as file:
                found[path.relative_to(folder).as_posix()] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def _damage(folder: Path) -> str:
    """What is wrong with a step folder, or nothing."""
    try:
        expected = json.loads((folder / MANIFEST).read_text())
    except FileNotFoundError:
        return f"it has no {MANIFEST}"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    found = _hashes(folder)
    changed = sorted(name for name in expected if found.get(name) != expected[name])
    return f"missing or altered: {', '.join(changed)}" if changed else ""


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
