"""A run in object storage: how its checkpoints get there complete, and how they are fetched and verified.

The objects have the names of the files in the run folder, so a copy of them is a run folder. Of a checkpoint the
manifest is uploaded last, and deleted first: without manifest.json there is no checkpoint for those who read. The
files of the run (metrics, samples, configuration) come before the manifest, so they are never older than the newest
checkpoint; resuming removes what is newer.
"""

import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from parity.errors import InputError
from parity.storage import manifest as manifests
from parity.storage.json import as_object, parse
from parity.storage.manifest import MANIFEST
from parity.storage.remote import MissingError, Remote, RemoteError
from parity.storage.retry import retrying
from parity.training import checkpoints
from parity.training.checkpoints import step_folder
from parity.training.runs import RunFolder

CONFIG = "config.json"
_CHECKPOINTS = "checkpoints/"


class DamagedCheckpointError(InputError):
    """A checkpoint in object storage that differs from its manifest."""


class MirroredRun:
    """A run in object storage.

    Args:
        remote: The objects.
    """

    def __init__(self, remote: Remote):
        self.remote = remote
        self.damaged: list[int] = []
        """The steps whose checkpoints could not be fetched because they are damaged."""
        self._sent: dict[str, Any] = {}  # {name: what distinguishes the content that this process uploaded}

    def config(self) -> dict[str, Any] | None:
        """Return the entries of config.json; None if there is no run here."""
        try:
            content = self.remote.read(CONFIG)
        except MissingError:
            return None
        origin = f"{self.remote.address}/{CONFIG}"
        return as_object(parse(content, origin), origin)

    def steps(self) -> list[int]:
        """Return the steps of the complete checkpoints, in ascending order."""
        return complete_steps(self.remote.list(_CHECKPOINTS))

    def push(self, run: RunFolder, step: int, sizes: Mapping[str, int], check: Callable[[], None]) -> list[str]:
        """Upload a checkpoint and the files of its run. What an interrupted call has left is replaced.

        Args:
            run: The run folder.
            step: The step of the checkpoint.
            sizes: {file of the run: number of bytes to upload}, for those that another thread appends to meanwhile.
            check: Called before each change; raises an error if this process may not write.

        Returns:
            The names of all objects afterwards.

        Raises:
            InputError: If the checkpoint is incomplete, an upload fails, or objects have other sizes than the files.
        """
        folder, prefix = step_folder(run.checkpoints, step), _prefix(step)
        manifest, content = manifests.read(folder), (folder / MANIFEST).read_bytes()
        files = {f"{prefix}{name}": folder / name for name in manifest.files}
        present = self.remote.list()
        expected = {name: path.stat().st_size for name, path in files.items()}
        is_complete = (
            prefix + MANIFEST in present
            and all(present.get(name) == size for name, size in expected.items())
            and self.remote.read(prefix + MANIFEST) == content
        )

        def needed(name: str, state: Any) -> bool:
            return self._sent.get(name) != state or present.get(name) != expected[name]

        if not is_complete:
            check()
            self.remote.remove(prefix + MANIFEST)
            for name, path in files.items():
                if needed(name, sha256 := manifest.files[name.removeprefix(prefix)]):
                    check()
                    self.remote.put(path, name)
                    self._sent[name] = sha256
        for path in sorted(path for path in run.path.iterdir() if path.is_file() and _is_run_file(path.name)):
            status = path.stat()
            size = expected[path.name] = sizes.get(path.name, status.st_size)
            if needed(path.name, state := (size, None if path.name in sizes else status.st_mtime_ns)):
                check()
                self._put_start(path, size)
                self._sent[path.name] = state
        present = self.remote.list()
        if wrong := [name for name, size in expected.items() if present.get(name) != size]:
            for name in wrong:
                self._sent.pop(name, None)
            raise RemoteError(f"{self.remote.address}: {', '.join(wrong)} did not arrive with the size of the file")
        if not is_complete:
            check()
            self.remote.write(prefix + MANIFEST, content)
        wanted = {*files, prefix + MANIFEST}
        for name in sorted(present):
            if name.startswith(prefix) and name not in wanted:  # of a former save of this step
                check()
                self.remote.remove(name)
        return sorted(wanted.union(name for name in present if not name.startswith(prefix)))

    def retain(
        self,
        names: Iterable[str],
        newest: int,
        keep: int,
        keep_every: int | None,
        best: int | None,
        check: Callable[[], None],
    ) -> None:
        """Delete the checkpoints before step `newest` that checkpoints.retain() deletes, and those left incomplete.

        Args:
            names: The names of all objects, as push() returns them.
            newest: The step that was uploaded last.
            keep: See checkpoints.retain(), as for the next two.
            keep_every: See `keep`.
            best: See `keep`.
            check: Called before each change; raises an error if this process may not write.
        """
        present = _by_step(names)
        complete = complete_steps(names)
        unwanted = set(checkpoints.superfluous(complete, newest, keep, keep_every, best))
        for step, files in present.items():
            if step in unwanted or (step < newest and step not in complete):
                check()
                for name in sorted(files, key=lambda name: name != MANIFEST):  # the manifest first
                    self.remote.remove(_prefix(step) + name)

    def fetch_files(self, folder: Path) -> None:
        """Copy the files of the run into a folder, without checkpoints."""
        folder.mkdir(parents=True, exist_ok=True)
        for name in retrying(self.remote.list):
            if "/" not in name and _is_run_file(name):
                retrying(self.remote.get, name, folder / name)

    def fetch_step(self, run: RunFolder, step: int) -> Path:
        """Copy a checkpoint into a run folder, verify it, and return its folder there.

        Raises:
            DamagedCheckpointError: If it differs from its manifest, or does not belong to the run.
            RemoteError: If it cannot be fetched.
        """
        target, address = step_folder(run.checkpoints, step), f"{self.remote.address}/{_prefix(step)}"
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=checkpoints.UNFINISHED, dir=run.checkpoints) as stage:
            unfinished = Path(stage, target.name)
            unfinished.mkdir()
            sizes = self._fetch_manifest(step, unfinished)
            manifest = _read_manifest(unfinished, address)
            if missing := sorted(manifest.files.keys() - sizes.keys()):
                raise DamagedCheckpointError(f"{address} is damaged: {', '.join(missing)} is missing")
            checkpoints.require_space(unfinished, sum(sizes[name] for name in manifest.files))
            names = sorted(manifest.files)
            for _ in range(2):  # a file that was corrupted in transit is correct when it is fetched again
                for name in names:
                    (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
                    retrying(self.remote.get, f"{_prefix(step)}{name}", unfinished / name)
                if not (names := manifests.altered(unfinished, manifest)):
                    break
            if damage := checkpoints.describe_damage(unfinished, run.identity()):
                raise DamagedCheckpointError(f"{address} is damaged: {damage}")
            checkpoints.publish(unfinished, target)
        return target

    def withdraw(self, step: int) -> None:
        """Delete the manifest of a damaged checkpoint, so that its files are uploaded again or deleted."""
        retrying(self.remote.remove, _prefix(step) + MANIFEST)

    def holds(self, folder: Path) -> bool:
        """Return whether a step folder has the manifest that the step has here."""
        name = f"{_CHECKPOINTS}{folder.name}/{MANIFEST}"
        try:
            return (folder / MANIFEST).read_bytes() == retrying(self.remote.read, name)
        except (OSError, MissingError):
            return False

    def _fetch_manifest(self, step: int, folder: Path) -> dict[str, int]:
        """Copy the manifest of a step into a folder; return the sizes of the step's objects, in bytes."""
        prefix = _prefix(step)
        objects = retrying(self.remote.list, prefix)
        retrying(self.remote.get, prefix + MANIFEST, folder / MANIFEST)
        return {name.removeprefix(prefix): size for name, size in objects.items()}

    def _put_start(self, path: Path, size: int) -> None:
        """Upload the first `size` bytes of a file."""
        if size == path.stat().st_size:
            self.remote.put(path, path.name)
            return
        with path.open("rb") as file:
            self.remote.write(path.name, file.read(size))


def complete_steps(names: Iterable[str]) -> list[int]:
    """Return the steps of the complete checkpoints among objects with these names, in ascending order."""
    return sorted(step for step, files in _by_step(names).items() if MANIFEST in files)


def _by_step(names: Iterable[str]) -> dict[int, list[str]]:
    """Return {step: names of its objects beneath its prefix}, of complete and incomplete checkpoints."""
    present: dict[int, list[str]] = {}
    for name in names:
        match = re.fullmatch(rf"{_CHECKPOINTS}([0-9]{{6,15}})/(.+)", name)
        if match and name.startswith(_prefix(int(match[1]))):
            present.setdefault(int(match[1]), []).append(match[2])
    return present


def _read_manifest(folder: Path, address: str) -> manifests.Manifest:
    try:
        return manifests.read(folder)
    except InputError as error:
        raise DamagedCheckpointError(f"{address} is damaged: {error}") from None


def _is_run_file(name: str) -> bool:
    """Whether a file in the run folder is the run's, and neither temporary, nor set aside, nor a lock."""
    return not (name.startswith(".") or ".part" in name or name.endswith(".damaged"))


def _prefix(step: int) -> str:
    return f"{_CHECKPOINTS}{step:06d}/"
