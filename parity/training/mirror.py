"""Runs that are fetched from object storage: to be resumed on another machine, or to be used."""

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parity.errors import InputError
from parity.storage.locks import LOCK, waiting_lock
from parity.storage.remote import MissingError, open_remote
from parity.storage.retry import retrying
from parity.training import checkpoints
from parity.training.checkpoints import step_folder
from parity.training.mirrored import CONFIG, DamagedCheckpointError, MirroredRun
from parity.training.runs import RunFolder


def fetch_config(run: RunFolder, address: str) -> None:
    """Copy config.json of a mirrored run into a run folder that has none.

    Raises:
        InputError: If neither has one.
    """
    if run.config_file.exists():
        return
    remote = open_remote(address)
    if retrying(remote.size, CONFIG) is None:
        raise InputError(
            f"neither --run {run.path} nor --mirror {remote.address} holds a run that --resume could continue; "
            "correct them, or start the run without --resume"
        )
    run.path.mkdir(parents=True, exist_ok=True)
    retrying(remote.get, CONFIG, run.config_file)


def fetch_newest(run: RunFolder, address: str) -> list[int]:
    """Copy the newest complete checkpoint of a mirrored run into its folder, unless that has a newer intact one.

    Args:
        run: The run folder, which has a config.json. It is locked meanwhile.
        address: Where the run is mirrored.

    Returns:
        The steps after it whose checkpoints are damaged there.

    Raises:
        InputError: If another run is mirrored there, the checkpoint cannot be fetched, or none of them is intact.
    """
    mirrored = MirroredRun(open_remote(address))
    run.lock()
    try:
        check_id(run, retrying(mirrored.config), mirrored.remote.address)
        local = _newest_local(run)
        if _steps_after(mirrored, local):
            mirrored.fetch_files(run.path)
            try:
                _fetch_newest_intact(mirrored, run, local)
            except DamagedCheckpointError:
                if local < 0:
                    raise
    finally:
        run.unlock()
    return mirrored.damaged


def pull(address: str, folder: Path, step: int | None = None) -> Path:
    """Copy a mirrored run with one checkpoint into a folder, from which it can then be used like any other run.

    A checkpoint that the folder has already is not fetched again, and stays there when a newer one is fetched.

    Args:
        address: Where the run is mirrored.
        folder: The folder. It is locked meanwhile, so that other processes wait.
        step: The step of the checkpoint; by default the newest one that is complete and intact.

    Returns:
        The folder of the checkpoint.

    Raises:
        MissingError: If the address holds no such checkpoint.
        InputError: If the address holds no run or only damaged checkpoints, or cannot be reached.
    """
    mirrored = MirroredRun(open_remote(address))
    with _locked(folder):
        run = _pull_files(mirrored, folder)
        steps = retrying(mirrored.steps)
        if not steps or step not in (None, *steps):
            which = "complete checkpoint" if step is None else f"step {step}"
            raise MissingError(
                f"{mirrored.remote.address} has no {which}; it has {', '.join(map(str, steps)) or 'none yet'}"
            )
        return _fetch_newest_intact(mirrored, run) if step is None else _fetch_first_intact(mirrored, run, [step])


def pull_files(address: str, folder: Path) -> RunFolder:
    """Copy the files of a mirrored run into a folder, without checkpoints; see pull()."""
    with _locked(folder):
        return _pull_files(MirroredRun(open_remote(address)), folder)


def check_id(run: RunFolder, mirrored: Mapping[str, Any] | None, address: str) -> None:
    """Raise InputError unless an address holds this run, or none.

    Args:
        run: The run folder.
        mirrored: The config.json at the address; None if there is none.
        address: The address, for messages.
    """
    own = run.config().get("id")
    if not isinstance(own, str):
        raise InputError(f"{run.path} was begun by version 0.1, whose runs have no id; it cannot be mirrored")
    if mirrored is not None and mirrored.get("id") != own:
        raise InputError(
            f"--mirror {address} holds another run (id {mirrored.get('id')!r:.50}) than {run.path} (id {own}); "
            "name another address"
        )


def _pull_files(mirrored: MirroredRun, folder: Path) -> RunFolder:
    if retrying(mirrored.config) is None:
        raise InputError(f"{mirrored.remote.address} holds no run: {CONFIG} is missing")
    mirrored.fetch_files(folder)
    run = RunFolder(folder)
    checkpoints.remove_unfinished(run.checkpoints)
    return run


def _steps_after(mirrored: MirroredRun, step: int) -> list[int]:
    return [later for later in retrying(mirrored.steps) if later > step]


def _fetch_newest_intact(mirrored: MirroredRun, run: RunFolder, after: int = -1) -> Path:
    """Fetch the newest intact checkpoint after a step; see _fetch_first_intact().

    A process that still trains the run may delete a checkpoint while it is fetched. Then it has uploaded a newer one.
    """
    steps = _steps_after(mirrored, after)
    while True:
        try:
            return _fetch_first_intact(mirrored, run, steps)
        except MissingError:
            before, steps = steps, _steps_after(mirrored, after)
            if steps == before:
                raise


def _fetch_first_intact(mirrored: MirroredRun, run: RunFolder, steps: list[int]) -> Path:
    """Fetch the last of these steps that is intact, with a warning for each that is not, and return its folder.

    Raises:
        DamagedCheckpointError: If none is intact.
    """
    reason = ""
    for step in reversed(steps):
        folder = step_folder(run.checkpoints, step)
        if mirrored.holds(folder) and not checkpoints.describe_damage(folder, run.identity()):
            return folder
        try:
            return mirrored.fetch_step(run, step)
        except DamagedCheckpointError as error:
            reason = str(error)
            mirrored.damaged.append(step)
            warnings.warn(f"a checkpoint is skipped: {error}", stacklevel=3)
    raise DamagedCheckpointError(f"{mirrored.remote.address} holds no intact checkpoint; {reason}")


def _newest_local(run: RunFolder) -> int:
    """Return the step of the newest intact checkpoint in the run folder, -1 if there is none."""
    if not checkpoints.steps(run.checkpoints):
        return -1
    try:
        return int(run.newest_intact().name)
    except InputError:
        return -1


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Make a folder and lock it, once no other process has locked it."""
    folder.mkdir(parents=True, exist_ok=True)
    with waiting_lock(folder / LOCK):
        yield
