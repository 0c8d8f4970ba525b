"""The folder of an evaluation: results.json, and items.jsonl, to which it adds each item as soon as it is computed."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from filelock import BaseFileLock

from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.json import SETTINGS, as_object, changed_settings, get_entry, read_lines, read_object
from parity.storage.locks import LOCK, lock_folder
from parity.training.processes import Processes

RESULTS, ITEMS = "results.json", "items.jsonl"


class Records:
    """The records of an evaluation that may have been interrupted.

    Args:
        folder: The folder, which is made if it does not exist.
        settings: Everything that the numbers depend on, as JSON. If the folder has records already, they must be of the
            same settings.
        writes: Whether this process writes the folder. The others of a run only read what is there at the beginning.

    Raises:
        InputError: If the folder belongs to an evaluation with other settings or to another process, or its files are
            damaged.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any], writes: bool = True):
        self.folder = folder
        self._items: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
        self._results: dict[str, Any] = {"settings": dict(settings), "results": []}
        self._file: IO[str] | None = None
        self._lock: BaseFileLock | None = None
        if not writes:
            self._read(settings)
            return
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = lock_folder(folder, lambda: f"another process is writing --out {folder}")
        if (folder / RESULTS).exists():
            self._read(settings, repair=True)
        elif any(path.name != LOCK for path in folder.iterdir()):
            raise InputError(f"--out {folder} is not empty and has no {RESULTS}; name another folder")
        else:
            self._write()
        self._file = (folder / ITEMS).open("a", encoding="utf-8")

    def done(self, protocol: str, model: str) -> dict[int, dict[str, Any]]:
        """Return the records of the items that are computed already, by index."""
        return self._items.get((protocol, model), {})

    def add(self, protocol: str, model: str, record: Mapping[str, Any]) -> None:
        """Add the record of an item."""
        if self._file is None:
            return
        self._file.write(line_of(protocol, model, record))
        self._file.flush()

    def finish(self, results: list[dict[str, Any]]) -> None:
        """Write the results of all protocols."""
        self._results["results"] = results
        if self._file is not None:
            self._write()

    def close(self) -> None:
        """Close the folder, so that another process may write it."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def _write(self) -> None:
        replace_text(self.folder / RESULTS, json.dumps(self._results, indent=1, ensure_ascii=False) + "\n")

    def _read(self, settings: Mapping[str, Any], repair: bool = False) -> None:
        if changed := changed_settings(read_results(self.folder)[0], settings):
            raise InputError(
                f"--out {self.folder} belongs to an evaluation with other options: {changed}. Name another "
                "folder, or repeat the options to go on with this one"
            )
        self._items = read_records(self.folder / ITEMS, repair)


def default_folder(models: Sequence[str], settings: Mapping[str, Any]) -> Path:
    """Return the folder of an evaluation without --out, given the names of the models."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:8]
    return Path("evaluations") / "-".join([*(Path(name).name for name in models), settings["backend"], digest])


def open_records(folder: Path, settings: dict[str, Any], these: Processes) -> Records:
    """Open the folder in the first process, and then, before anything is added, in the others."""
    records = Records(folder, settings) if these.first else None
    these.barrier()
    records = records or Records(folder, settings, writes=False)
    these.barrier()
    return records


def read_results(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the settings and the results in results.json; raises InputError if they are missing or damaged."""
    path = folder / RESULTS
    entries = read_object(path, SETTINGS)
    results = [as_object(entry, f"{path}, results") for entry in get_entry(entries, "results", list, str(path))]
    return get_entry(entries, "settings", dict, str(path)), results


def read_records(path: Path, repair: bool = False) -> dict[tuple[str, str], dict[int, dict[str, Any]]]:
    """Return {(protocol, model): {index: record}} of items.jsonl, which need not exist.

    Args:
        path: The file.
        repair: Whether to remove a last line that is not complete.

    Raises:
        InputError: If a line is damaged.
    """
    items: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    if not path.exists():
        return items
    with path.open("r+b" if repair else "rb") as file:
        for origin, record in read_lines(file, path, repair):
            protocol, model = (get_entry(record, name, str, origin) for name in ("protocol", "model"))
            index = get_entry(record, "index", int, origin)
            del record["protocol"], record["model"]
            items.setdefault((protocol, model), {})[index] = record
    return items


def line_of(protocol: str, model: str, record: Mapping[str, Any]) -> str:
    """Return the line of an item in items.jsonl."""
    return json.dumps({"protocol": protocol, "model": model, **record}, ensure_ascii=False) + "\n"
