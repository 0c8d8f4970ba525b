"""Objects that the file systems of fsspec reach: s3, gs, hf and memory."""

import contextlib
import datetime
import importlib
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from parity.errors import InputError, install_extras, pip_install, printable
from parity.storage.remote_base import Entry, MissingError, Remote, RemoteError

# {scheme: (module of the client, the extra that installs it)}; fsspec itself comes with each of them, and with torch.
CLIENTS = {
    "s3": ("s3fs", "s3"),
    "gs": ("gcsfs", "gcs"),
    "hf": ("huggingface_hub", None),
    "memory": ("fsspec", None),
}


class Bucket(Remote):
    """Objects that a file system of fsspec reaches. Only calls that make an object whole or not at all are used."""

    def __init__(self, shown: str, address: str, scheme: str):
        super().__init__(shown)
        self._scheme = scheme
        module, extra = CLIENTS[scheme]
        try:
            import fsspec

            importlib.import_module(module)
        except ModuleNotFoundError as error:
            remedy = f"the extra {extra}: {install_extras(extra)}" if extra else f"it: {pip_install(module)}"
            raise RemoteError(f"{shown} needs {error.name}, which is not installed; install {remedy}") from None
        # No listing is remembered, because other machines write too; no client either: the environment may change.
        options: dict[str, Any] = {} if scheme == "memory" else {"use_listings_cache": False}
        with self._errors(""):
            self._files = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
            self._root = self._files._strip_protocol(address).rstrip("/")

    def read(self, name: str) -> bytes:
        with self._errors(name):
            return self._files.cat_file(self._path(name))

    def entry(self, name: str) -> Entry | None:
        with self._errors(name):
            try:
                info = self._files.info(self._path(name))
            except FileNotFoundError:
                return None
            return _entry(info) if info["type"] == "file" else None

    def entries(self, prefix: str = "") -> dict[str, Entry]:
        folder = self._check(prefix).rpartition("/")[0]
        with self._errors(folder):
            try:
                infos = self._files.find(self._path(folder), detail=True)
            except FileNotFoundError:
                if self._scheme != "memory":  # where prefixes need not exist, this is a bucket that is missing
                    raise
                infos = {}
        inside = f"{self._root}/"
        named = {path.removeprefix(inside): info for path, info in infos.items() if path.startswith(inside)}
        # Consoles represent an empty folder by an object whose name ends with a slash.
        return {name: _entry(named[name]) for name in sorted(named) if name.startswith(prefix) and name[-1:] not in "/"}

    def put(self, path: Path, name: str) -> None:
        with self._errors(name, writes=True):
            self._files.put_file(str(path), self._path(name))

    def write(self, name: str, content: bytes) -> None:
        with self._errors(name, writes=True):
            self._files.pipe_file(self._path(name), content)

    def create(self, name: str, content: bytes) -> None:
        with self._errors(name, writes=True):
            try:
                self._files.pipe_file(self._path(name), content, mode="create")
            except Exception as error:
                if isinstance(error, FileExistsError) or getattr(error, "code", None) in (412, "412"):
                    raise FileExistsError(self._shown(name)) from None
                raise

    def remove(self, name: str) -> None:
        with self._errors(name, writes=True), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def _fetch(self, name: str, part: Path, entry: Entry) -> None:
        with self._errors(name):
            self._files.get_file(self._path(name), str(part))

    def _path(self, name: str) -> str:
        return f"{self._root}/{self._check(name)}" if name else self._root

    @contextlib.contextmanager
    def _errors(self, name: str, writes: bool = False) -> Iterator[None]:
        """Turn the exceptions of the client libraries, which have no common class, into RemoteErrors."""
        if writes and self._scheme == "hf":
            raise self._read_only(name)
        try:
            yield
        except (InputError, FileExistsError):
            raise
        except FileNotFoundError:
            raise MissingError(f"{self._shown(name)} is missing") from None
        except Exception as error:
            raise RemoteError(f"{self._shown(name)}: {reason(error)}") from None


def _entry(info: Mapping[str, Any]) -> Entry:
    """Return size and tag of an object as the file systems of fsspec describe it."""
    tag = next((info[key] for key in ("ETag", "etag", "blob_id", "created") if info.get(key)), None)
    if isinstance(tag, datetime.datetime):
        tag = tag.timestamp()
    return Entry(int(info["size"]), None if tag is None else str(tag))


def reason(error: Exception) -> str:
    """Return what an exception of a client library says, without what may be secret."""
    text = " ".join(str(error).split())
    text = re.sub(r"//[^/@\s]+@", "//", re.sub(r"\?[^\s'\"]+", "", text))  # user and password, and signatures
    for name, value in os.environ.items():
        if len(value) >= 8 and re.search("SECRET|TOKEN|PASSWORD", name):
            text = text.replace(value, "***")
    return printable(f"{type(error).__name__}: {text}" if text else type(error).__name__, 500)
