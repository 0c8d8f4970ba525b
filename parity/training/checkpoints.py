"""Checkpoint folders, each either complete or absent, with a manifest that ties it to its run and shows later damage.

checkpoints/000500/ holds what the backend wrote after step 500, and manifest.json (parity/storage/manifest.py). The
folder is written under another name, and renamed once all of it is on disk.
"""

import dataclasses
import errno
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path

from parity.errors import InputError
from parity.storage import manifest as manifests
from parity.storage.atomic import sync
from parity.storage.manifest import MANIFEST, Manifest
from parity.training.processes import ALONE, Processes

UNFINISHED = ".unfinished-"
"""How the name of a folder begins that is not complete yet."""
_SET_ASIDE = ".damaged-"


@dataclasses.dataclass(frozen=True)
class RunIdentity:
    """What ties a checkpoint to its run."""

    run: str | None = None
    """The id in the run's config.json; runs of older versions have none."""
    settings: str | None = None
    """sha256 of the settings that a resume may not change."""


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
    held: Collection[int] = (),
    processes: Processes = ALONE,
    describe: Callable[[dict[str, str]], Manifest] = Manifest,
    read_back: Callable[[Path], None] = lambda folder: None,
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
        held: The checkpoints of these steps are kept for now, because they are being read.
        processes: The processes of the run.
        describe: Returns the manifest of a folder with the given {file: sha256}.
        read_back: Called with the written folder; raises InputError unless what was written can be read.

    Returns:
        The checkpoint's folder.

    Raises:
        InputError: If the disk has no room for it or refuses a write, or it cannot be read back; earlier checkpoints
            stay as they were.
    """
    target, unfinished = step_folder(checkpoints, step), checkpoints / f"{UNFINISHED}{step:06d}"
    try:
        if processes.first:
            checkpoints.mkdir(parents=True, exist_ok=True)
            remove_unfinished(checkpoints)
            unfinished.mkdir()
        processes.barrier()
        write(unfinished)
        processes.barrier()
        if processes.first:
            read_back(unfinished)
            manifests.write(unfinished, dataclasses.replace(describe(manifests.file_hashes(unfinished)), step=step))
            publish(unfinished, target)
    except (OSError, InputError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise InputError(
            f"checkpoint {target} could not be written ({error}); earlier checkpoints are intact. "
            "Correct that (is the disk full?), then continue with --resume"
        ) from error
    if processes.first:
        retain(checkpoints, step, keep, keep_every, best, held)
    processes.barrier()
    return target


def publish(unfinished: Path, target: Path) -> None:
    """Flush a complete folder to disk and give it the name of its step; one that has that name is set aside."""
    _flush(unfinished)
    if os.path.lexists(target):
        _set_aside(target)
    unfinished.rename(target)
    sync(target.parent)


def retain(
    checkpoints: Path,
    newest: int,
    keep: int,
    keep_every: int | None = None,
    best: int | None = None,
    held: Collection[int] = (),
) -> None:
    """Delete the checkpoints before step `newest` that are not to be kept; see save().

    `newest` itself and later ones are never deleted. What cannot be deleted is reported and left.
    """
    for step in superfluous(steps(checkpoints), newest, keep, keep_every, best):
        if step not in held:
            _remove(step_folder(checkpoints, step))


def superfluous(
    present: Iterable[int], newest: int, keep: int, keep_every: int | None = None, best: int | None = None
) -> list[int]:
    """Return those of the steps `present` that retain() deletes."""
    older = sorted(step for step in present if step < newest)
    oldest = older[: max(0, len(older) - (keep - 1))]
    return [step for step in oldest if step != best and not (keep_every and step % keep_every == 0)]


def remove_unfinished(checkpoints: Path) -> None:
    """Delete what a process that was killed during a save left behind."""
    for leftover in checkpoints.glob(f"{UNFINISHED}*"):
        _remove(leftover)


def set_aside_later(checkpoints: Path, step: int) -> None:
    """Rename the checkpoints after `step`, which a resumed run writes again, so that none is taken for a new one."""
    for later in steps(checkpoints):
        if later > step:
            _set_aside(step_folder(checkpoints, later))


def require_space(folder: Path, size: int) -> None:
    """Raise OSError unless the disk has room for `size` bytes: a save should fail before it writes, not halfway."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise OSError(errno.ENOSPC, f"{size / 1e6:,.2f} MB are needed, {free / 1e6:,.2f} MB are free", str(folder))


def steps(checkpoints: Path) -> list[int]:
    """Return the steps that have a folder, in ascending order."""
    numbers = {
        int(path.name)
        for path in checkpoints.glob("[0-9]*")
        if path.name.isascii() and path.name.isdecimal() and path.is_dir()
    }
    return sorted(step for step in numbers if step_folder(checkpoints, step).is_dir())


def newest_intact(checkpoints: Path, identity: RunIdentity | None = None) -> Path:
    """Return the newest step folder that matches its manifest, with a warning for each newer one that does not.

    Args:
        checkpoints: The folder of all checkpoints of a run.
        identity: The run that they must belong to; None accepts any.

    Raises:
        InputError: If there is none.
    """
    reason = "was the run stopped before its first evaluation?"
    for step in reversed(steps(checkpoints)):
        folder = step_folder(checkpoints, step)
        if not (damage := describe_damage(folder, identity)):
            return folder
        reason = f"of step {step}, {damage}"
        warnings.warn(f"checkpoint {folder} is skipped: {damage}", stacklevel=2)
    raise InputError(f"{checkpoints} holds no intact checkpoint; {reason}")


def intact(checkpoints: Path, step: int, identity: RunIdentity | None = None) -> Path:
    """Return the folder of a step.

    Raises:
        InputError: If it is missing or damaged, or does not belong to the run; the message says which.
    """
    folder = step_folder(checkpoints, step)
    if not folder.is_dir():
        raise InputError(
            f"{checkpoints} has no step {step}; it has {', '.join(map(str, steps(checkpoints))) or 'none'}"
        )
    if damage := describe_damage(folder, identity):
        raise InputError(f"checkpoint {folder} is damaged: {damage}")
    return folder


def describe_damage(folder: Path, identity: RunIdentity | None) -> str:
    """Describe how a step folder differs from its manifest and its run; an empty text if it does not."""
    try:
        manifest = manifests.read(folder)
        if manifest.step is not None and manifest.step != int(folder.name):
            return f"its {MANIFEST} says step {manifest.step}, so the folder was renamed or copied"
        if identity is not None and manifest.run != identity.run:
            return "it belongs to another run than config.json"
        if identity is not None and manifest.settings not in (None, identity.settings):
            return "it was saved with other settings than those in config.json, which has been changed since"
        changed = manifests.altered(folder, manifest)
    except InputError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"
    return f"missing or altered: {', '.join(changed)}" if changed else ""


def _remove(path: Path) -> None:
    """Delete a folder, or the link to one; what cannot be deleted is reported and left."""
    try:
        if path.is_symlink() or not path.is_dir():
            path.unlink()
        else:
            (path / MANIFEST).unlink(
                missing_ok=True
            )  # first, so that a folder that is deleted in part counts as damaged
            shutil.rmtree(path)
    except OSError as error:
        warnings.warn(f"{path} cannot be deleted ({error}); delete it yourself", stacklevel=2)


def _set_aside(path: Path) -> None:
    """Rename a step folder so that it no longer counts as one; raises OSError if that is impossible."""
    aside, number = path.with_name(f"{_SET_ASIDE}{path.name}"), 2
    while os.path.lexists(aside):
        aside, number = path.with_name(f"{_SET_ASIDE}{path.name}-{number}"), number + 1
    path.rename(aside)
    warnings.warn(f"checkpoint {path} is set aside as {aside.name}; delete it if you do not need it", stacklevel=2)


def _flush(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        sync(path)
