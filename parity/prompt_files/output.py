"""The file of continuations, which is written in the order of the prompts and goes on where it was stopped."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from parity.errors import InputError
from parity.parts import Part
from parity.storage.atomic import named_errors, replace_text
from parity.storage.json import SETTINGS, changed_settings, read_lines, read_object
from parity.storage.locks import lock_file

SUFFIX = ".jsonl"


def output_path(path: Path, part: Part | None) -> Path:
    """Return the file of a part; raises InputError for a name without .jsonl.

    In the order of their names, the files of all parts together are the file that one process writes.
    """
    if path.suffix != SUFFIX:
        raise InputError(f"--out {path}: name a file {SUFFIX}, which gets a JSON object per prompt")
    return path if part is None else path.with_name(f"{path.stem}-{part.label}{SUFFIX}")


class Output:
    """A file with a line per prompt.

    NAME.settings.json beside it has everything that the lines depend on, and NAME.lock excludes a second process.

    Args:
        path: The file. If it has lines already, they must be of the same settings.
        settings: Everything that the lines depend on, as JSON.
        ids: The ids of the prompts, in order.

    Raises:
        InputError: If the file is of other settings, of another program or in use by another process, or is damaged.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any], ids: Sequence[int | str]):
        self.path = path
        self.n_done = 0
        """Number of prompts whose lines are written."""
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = lock_file(path.with_suffix(".lock"), lambda: f"another process is writing --out {path}")
        self._file: IO[bytes] | None = None
        try:
            self._check(path.with_suffix(".settings.json"), settings)
            self._file = path.open("ab+")
            self._go_on(ids)
        except BaseException:
            self.close()
            raise

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write the lines of the next prompts."""
        assert self._file is not None
        with named_errors(self.path):
            self._file.write("".join(f"{json.dumps(record, ensure_ascii=False)}\n" for record in records).encode())
            self._file.flush()
        self.n_done += len(records)

    def close(self) -> None:
        """Close the file, so that another process may write it."""
        if self._file is not None:
            self._file.close()
        if self._lock is not None:
            self._lock.release()

    def _check(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Compare the settings with those of the lines that are there; write them if there are none."""
        if not self.path.exists() or self.path.stat().st_size == 0:
            replace_text(path, json.dumps(dict(settings), indent=1, ensure_ascii=False) + "\n")
        elif not path.exists():
            raise InputError(f"--out {self.path} exists, without {path.name} beside it; name another file")
        elif changed := changed_settings(read_object(path, SETTINGS), settings):
            raise InputError(
                f"--out {self.path} has continuations with other options: {changed}. Name another file, or repeat the "
                "options to go on with this one"
            )

    def _go_on(self, ids: Sequence[int | str]) -> None:
        """Count the lines, which must be those of the first prompts, and remove one that is not complete."""
        assert self._file is not None
        self._file.seek(0)
        for number, (origin, record) in enumerate(read_lines(self._file, self.path, repair=True), 1):
            if number > len(ids) or record.get("id") != ids[number - 1]:
                raise InputError(f"{origin} is not of prompt {number} of --prompts; name another file with --out")
            self.n_done = number
