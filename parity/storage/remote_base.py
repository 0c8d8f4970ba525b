"""What the objects at an address can do, whatever kind of address it is."""

import abc
import secrets
from pathlib import Path
from typing import NamedTuple

from parity.errors import InputError
from parity.storage.atomic import sync
from parity.storage.manifest import hash_file


class RemoteError(InputError):
    """An address that cannot be used. The message names it, without credentials."""


class MissingError(RemoteError):
    """There is no object of this name."""


class DamagedError(RemoteError):
    """An object has another sha256 than expected."""


class Entry(NamedTuple):
    """An object of a listing."""

    size: int
    """Size in bytes."""
    tag: str | None
    """What changes when the content changes (an entity tag, or a time), if the storage has such a thing."""


class Remote(abc.ABC):
    """The objects at an address.

    Names are relative to the address, with "/"; an empty name is the object at the address itself. Every method raises
    RemoteError for a failure, which may be temporary, and MissingError for an object that is missing.
    """

    def __init__(self, address: str):
        self.address = address.rstrip("/")
        """The address, without anything secret, for messages."""

    @abc.abstractmethod
    def read(self, name: str) -> bytes:
        """Return the content of an object."""

    @abc.abstractmethod
    def entry(self, name: str) -> Entry | None:
        """Return size and tag of an object; None if there is none of this name."""

    @abc.abstractmethod
    def entries(self, prefix: str = "") -> dict[str, Entry]:
        """Return the objects whose names begin with `prefix`, by name. Nothing is remembered between two calls."""

    @abc.abstractmethod
    def put(self, path: Path, name: str) -> None:
        """Copy a file to an object, which appears or is replaced only when it is complete."""

    @abc.abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Make or replace an object."""

    @abc.abstractmethod
    def create(self, name: str, content: bytes) -> None:
        """Make an object; raises FileExistsError if there is one. Of two processes that do so, one succeeds."""

    @abc.abstractmethod
    def remove(self, name: str) -> None:
        """Delete an object, if there is one."""

    @abc.abstractmethod
    def _fetch(self, name: str, part: Path, entry: Entry) -> None:
        """Copy an object to a new file."""

    def address_of(self, name: str) -> str:
        """Return the address of an object, as open_remote() takes it."""
        return f"{self.address}/{name}"

    def size(self, name: str) -> int | None:
        """Return the size of an object in bytes; None if there is none of this name."""
        entry = self.entry(name)
        return None if entry is None else entry.size

    def list(self, prefix: str = "") -> dict[str, int]:
        """Return {name: size in bytes} of the objects whose names begin with `prefix`."""
        return {name: entry.size for name, entry in self.entries(prefix).items()}

    def get(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Copy an object to a file, which appears or is replaced only when it is complete and on the disk.

        Args:
            name: The object.
            path: The file; its folder must exist.
            sha256: Hash of the content, if known; an object with another hash is refused.
        """
        entry = self.entry(self._check(name))
        if entry is None:
            raise MissingError(f"{self._shown(name)} is missing")
        part = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
        try:
            self._fetch(name, part, entry)
            if (size := part.stat().st_size) != entry.size:
                raise RemoteError(f"{self._shown(name)}: {size:,} of {entry.size:,} bytes arrived")
            if sha256 is not None and (digest := hash_file(part)) != sha256:
                raise DamagedError(f"{self._shown(name)} is damaged: its sha256 is {digest}, expected {sha256}")
            sync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)

    def _shown(self, name: str) -> str:
        return f"{self.address}/{name}" if name else self.address

    def _check(self, name: str) -> str:
        """Return a name; raises RemoteError for one that leads out of the address."""
        if name.startswith("/") or ".." in name.split("/"):
            raise RemoteError(f"{self._shown(name)}: a name must stay beneath the address")
        return name

    def _read_only(self, name: str) -> RemoteError:
        return RemoteError(f"{self._shown(name)} cannot be written: addresses of this kind are for reading only")
