"""manifest.json of a saved folder: the sha256 of its files and, in a checkpoint, the run and the step it belongs to."""

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.json import LISTING, read_object

MANIFEST = "manifest.json"
WEIGHTS, ADAPTER = "model.safetensors", "adapter_model.safetensors"
# A file that was changed within this time may change again without a new time stamp; its hash is not remembered.
_CLOCK_STEP_NS = 2_000_000_000


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The entries of manifest.json; None stands for what an older version did not record."""

    files: Mapping[str, str]
    """{path relative to the folder, with "/": sha256 in lower-case hexadecimal} of every other file."""
    weights: str = WEIGHTS
    """The file with the weights, one of `files`."""
    run: str | None = None
    """The id of the run, from its config.json."""
    step: int | None = None
    """Number of steps made."""
    settings: str | None = None
    """sha256 of the run's settings that a resume may not change."""
    metrics_size: int | None = None
    """Size of the run's metrics.jsonl at the time of the save, in bytes."""
    metrics_sha256: str | None = None
    """sha256 of these bytes."""


def weights_file(names: Iterable[str]) -> str:
    """Return the file with the weights among the files of a checkpoint, which may hold an adapter alone."""
    return ADAPTER if ADAPTER in names else WEIGHTS


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, which is always read."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file; an unchanged file is read only once per process."""
    status = path.stat()
    if time.time_ns() - status.st_mtime_ns < _CLOCK_STEP_NS:
        return hash_file(path)
    return _remembered_sha256(path.absolute(), status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_hashes(folder: Path) -> dict[str, str]:
    """Return {path relative to the folder: sha256} of all files in it but manifest.json."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path != folder / MANIFEST)
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def write(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    replace_text(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


def read(folder: Path) -> Manifest:
    """Read manifest.json of a checkpoint, in today's form or in that of version 0.1, {path: sha256}.

    Raises:
        InputError: If it is missing, is not JSON, or is not a manifest of weights.
    """
    if not (folder / MANIFEST).exists():
        raise InputError(f"it has no {MANIFEST}")
    manifest = _from_entries(_read_json(folder))
    if manifest is None:
        raise InputError(f"its {MANIFEST} is not the manifest of a checkpoint")
    return manifest


def altered(folder: Path, manifest: Manifest, names: Iterable[str] | None = None) -> list[str]:
    """Return the files (by default all) of a manifest that are missing or differ from it."""
    return [
        name
        for name in sorted(manifest.files if names is None else names)
        if not (folder / name).is_file() or file_sha256(folder / name) != manifest.files[name]
    ]


def check_weights(folder: Path) -> None:
    """Check a folder that weights are read from against the manifest.json beside them, if it has one.

    Raises:
        InputError: If the configuration or the weights differ from it.
    """
    if not (folder / MANIFEST).exists():
        return
    try:
        manifest = _from_entries(_read_json(folder))
    except InputError as error:
        raise InputError(f"{folder}: {error}; copy the folder again") from None
    if manifest is None:  # that of another program
        return
    configurations = ("config.json", "hparams.json", "adapter_config.json", "classifier.json")
    names = [name for name in (*configurations, manifest.weights) if name in manifest.files]
    if changed := altered(folder, manifest, names):
        raise InputError(
            f"{folder}: {', '.join(changed)} is missing or differs from its sha256 in {MANIFEST}, so it is damaged; "
            f"copy the folder again, or delete {MANIFEST} if you changed the file yourself"
        )


def forget(folder: Path) -> None:
    """Delete the manifest of weights that are about to be replaced; that of another program stays."""
    try:
        is_ours = (folder / MANIFEST).exists() and _from_entries(_read_json(folder)) is not None
    except InputError:
        is_ours = False
    if is_ours:
        (folder / MANIFEST).unlink()


def _read_json(folder: Path) -> dict[str, Any]:
    """Return the content of manifest.json."""
    return read_object(folder / MANIFEST, LISTING, f"its {MANIFEST}")


def _from_entries(entries: dict[str, Any]) -> Manifest | None:
    """Return None for JSON that is not the manifest of weights."""
    known = {field.name for field in dataclasses.fields(Manifest)}
    if "files" not in entries:  # of version 0.1
        entries = {"files": entries}
    fields: dict[str, Any] = {key: value for key, value in entries.items() if key in known}
    files, weights = fields["files"], fields.get("weights", WEIGHTS)
    if not isinstance(files, dict) or not all(_is_hash(value) for value in files.values()) or weights not in files:
        return None
    if any(Path(name).is_absolute() or ".." in Path(name).parts for name in files):
        return None
    types = {"run": str, "step": int, "settings": str, "metrics_size": int, "metrics_sha256": str}
    for name, kind in types.items():
        if not isinstance(fields.get(name), kind | None) or isinstance(fields.get(name), bool):
            return None
    return Manifest(**fields)


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64


@functools.lru_cache(maxsize=4096)
def _remembered_sha256(path: Path, *_state: int) -> str:
    return hash_file(path)
