"""Checkpoints of runs that are mirrored to an address, copied into the cache folder when they are used."""

import hashlib
from pathlib import Path

from parity.errors import InputError
from parity.storage.paths import cache_folder
from parity.storage.remote import MissingError, open_remote
from parity.training.mirror import pull, pull_files
from parity.training.runs import RunFolder


def runs_folder() -> Path:
    """Return the folder that holds the copies of mirrored runs, in a folder for each."""
    return cache_folder() / "runs"


def pull_checkpoint(address: str, which: str = "newest") -> tuple[RunFolder, Path]:
    """Copy a checkpoint of a mirrored run into the cache folder, unless it is there already.

    Args:
        address: Where the run is mirrored.
        which: "newest" (the newest one that is complete and intact), "best" (lowest validation loss), or a step.

    Returns:
        The copy of the run, and the folder of the checkpoint in it.

    Raises:
        InputError: If the address holds no run or no such checkpoint, or cannot be reached.
    """
    remote = open_remote(address)
    name = remote.address.rpartition("/")[2]
    folder = runs_folder() / f"{name}-{hashlib.sha256(remote.address.encode()).hexdigest()[:8]}"
    step = None if which == "newest" else choose_step(pull_files(address, folder), which)
    try:
        checkpoint = pull(address, folder, step)
    except MissingError:  # the process that trains the run may have deleted the best one, because another is better now
        later = None if step is None else choose_step(RunFolder(folder), which)
        if later == step:
            raise
        checkpoint = pull(address, folder, later)
    return RunFolder(folder), checkpoint


def choose_step(run: RunFolder, which: str) -> int:
    """Return the step that --checkpoint names: "best", or a number.

    Raises:
        InputError: If it is neither, and for "best" if the run has no evaluations.
    """
    if which == "best" and (best := run.metrics.best_step()) is not None:
        return best
    if which.isascii() and which.isdecimal() and len(which) < 10:
        return int(which)
    raise InputError(
        f"--checkpoint {which:.40}: give newest, best (for a run with evaluations), or the number of a step"
    )
