"""Files beneath a file:// address, which may be a mounted bucket."""

import contextlib
import os
import secrets
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path

from parity.storage.atomic import sync
from parity.storage.remote_base import Entry, MissingError, Remote, RemoteError


class Folder(Remote):
    """Files of a folder, which may be a mounted bucket."""

    def __init__(self, shown: str, path: Path, host: str):
        super().__init__(shown)
        if host not in ("", "localhost") or not path.is_absolute():
            raise RemoteError(f"{shown}: write a folder of this machine as file:///PATH, with three slashes")
        self._root = path

    def address_of(self, name: str) -> str:
        # The path in a file:// address is percent-encoded; what need not be encoded stays as it is.
        return super().address_of(name.translate({ord(character): f"%{ord(character):02X}" for character in "%#?"}))

    def read(self, name: str) -> bytes:
        with self._errors(name):
            return self._path(name).read_bytes()

    def entry(self, name: str) -> Entry | None:
        with self._errors(name):
            return _file_entry(self._path(name))

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        folder = self._path(self._check(prefix).rpartition("/")[0])
        entries: dict[str, Entry] = {}
        with self._errors(prefix):
            for parent, _, names in os.walk(folder, onerror=_raise_unless_missing):
                for path in (Path(parent, name) for name in names):
                    name, entry = path.relative_to(self._root).as_posix(), _file_entry(path)
                    if entry is not None and name.startswith(prefix) and not _is_part(path):
                        entries[name] = entry
        return dict(sorted(entries.items()))

    def put(self, path: Path, name: str) -> None:
        with self._errors(name), self._replacing(name) as part:
            shutil.copyfile(path, part)

    def write(self, name: str, content: bytes) -> None:
        with self._errors(name), self._replacing(name) as part:
            part.write_bytes(content)

    def create(self, name: str, content: bytes) -> None:
        path = self._path(name)
        with self._errors(name):
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("xb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())

    def remove(self, name: str) -> None:
        with self._errors(name):
            self._path(name).unlink(missing_ok=True)

    def _fetch(self, name: str, part: Path, entry: Entry) -> None:
        with self._errors(name):
            shutil.copyfile(self._path(name), part)

    def _path(self, name: str) -> Path:
        return self._root / self._check(name)

    @contextlib.contextmanager
    def _replacing(self, name: str) -> Iterator[Path]:
        """Yield the path of a file that takes the place of an object when it is on the disk."""
        path = self._path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
        try:
            yield part
            sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise MissingError(f"{self._shown(name)} is missing") from None
        except FileExistsError:
            raise
        except OSError as error:
            raise RemoteError(f"{self._shown(name)}: {error.strerror or error}") from None


def _is_part(path: Path) -> bool:
    return path.name.startswith(".") and path.suffix == ".part"


def _raise_unless_missing(error: OSError) -> None:
    """Raise an error of a listing, unless its folder does not exist, perhaps because it was removed meanwhile."""
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def _file_entry(path: Path) -> Entry | None:
    """Return the entry of a file; None if there is none, perhaps because it was removed meanwhile."""
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Entry(status.st_size, str(status.st_mtime_ns)) if stat.S_ISREG(status.st_mode) else None
