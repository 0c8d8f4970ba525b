"""Files of a web server, with the downloads of this project."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlsplit, urlunsplit

from parity.storage.download import RemoteFile, transfer
from parity.storage.http_transfer import TransientError, UnusableError, inquire
from parity.storage.remote_base import Entry, Remote, RemoteError


class Web(Remote):
    """Files of a web server, which cannot be listed or written."""

    def __init__(self, shown: str, address: str):
        super().__init__(shown)
        self._parts = urlsplit(address)

    def read(self, name: str) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            self.get(name, Path(folder) / "content")
            return (Path(folder) / "content").read_bytes()

    def entry(self, name: str) -> Entry | None:
        with self._errors(name):
            answer = inquire(self._url(name))
        if answer is not None and answer.size is None:
            raise RemoteError(f"{self._shown(name)}: the server does not say how large the file is")
        return None if answer is None else Entry(answer.size or 0, answer.tag)

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        raise RemoteError(f"{self.address}: a web server does not list its files; name each of them")

    def put(self, path: Path, name: str) -> None:
        raise self._read_only(name)

    def write(self, name: str, content: bytes) -> None:
        raise self._read_only(name)

    def create(self, name: str, content: bytes) -> None:
        raise self._read_only(name)

    def remove(self, name: str) -> None:
        raise self._read_only(name)

    def _fetch(self, name: str, part: Path, entry: Entry) -> None:
        try:
            with self._errors(name):
                transfer(RemoteFile(name, entry.size), part, self._url(name))
        finally:
            for end in ("part", "part.etag"):  # what a failed transfer leaves, under a name that is never used again
                part.with_name(f"{part.name}.{end}").unlink(missing_ok=True)

    def _url(self, name: str) -> str:
        if not name:
            return urlunsplit(self._parts)
        if self._parts.query:
            raise RemoteError(f"{self._shown(name)}: an address with a query (?) is that of one file, not of a folder")
        return urlunsplit(self._parts._replace(path=f"{self._parts.path.rstrip('/')}/{quote(self._check(name))}"))

    @contextlib.contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except (UnusableError, TransientError) as error:
            raise RemoteError(f"{self._shown(name)}: {error}") from None
