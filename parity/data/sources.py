"""The files that a corpus is prepared from: paths, and objects at addresses (s3, gs, hf, https)."""

import contextlib
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from parity.data import documents
from parity.errors import InputError
from parity.storage.bucket import CLIENTS
from parity.storage.remote import MissingError, Remote, is_address, open_remote
from parity.storage.retry import retrying, retrying_long


def find_sources(sources: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Return the files of the sources, in order, as index.json lists them.

    Args:
        sources: Paths of files and folders; addresses of objects, and of folders of them, which are listed here once.

    Returns:
        {"path", "bytes"} of each file; for an object also "tag", which changes with its content, if there is one.

    Raises:
        InputError: For a source that does not exist, cannot be read or listed, or is of a kind that is not supported.
    """
    entries: list[dict[str, Any]] = []
    for source in sources:
        if is_address(source):
            entries += _find_objects(str(source))
        else:
            files = documents.find_files([Path(source)])
            entries += [{"path": str(file), "bytes": file.stat().st_size} for file in files]
    return entries


def current_entry(path: str) -> dict[str, Any]:
    """Return the entry of index.json for a file or object as it is now."""
    if is_address(path):
        return retrying_long(_entry, open_remote(path))
    return {"path": path, "bytes": Path(path).stat().st_size}


def change_time(path: str) -> int:
    """Return when a file was changed, in nanoseconds; 0 for an object, whose entry has a tag."""
    return 0 if is_address(path) else Path(path).stat().st_mtime_ns


@contextlib.contextmanager
def local_copy(path: str, folder: Path) -> Iterator[Path]:
    """Yield the path of a file or, for an object, that of a copy, which is deleted at the end.

    Args:
        path: Path of the file, or address of the object.
        folder: Where the copy is made.

    Raises:
        InputError: If the object cannot be read, or changes while it is; and, with its address in the place of the
            path of the copy, whatever is raised within the context.
    """
    if not is_address(path):
        yield Path(path)
        return
    remote = open_remote(path)
    with tempfile.TemporaryDirectory(prefix="source-", dir=folder) as temporary:
        copy = Path(temporary) / remote.address.rpartition("/")[2]
        before = retrying_long(_entry, remote)
        retrying_long(remote.get, "", copy)
        if retrying_long(_entry, remote) != before:
            raise InputError(f"{remote.address} changed while it was read; run again")
        try:
            yield copy
        except InputError as error:
            raise InputError(str(error).replace(str(copy), remote.address)) from None


def _find_objects(address: str) -> list[dict[str, Any]]:
    remote, parts = open_remote(address), urlsplit(address)
    if parts.scheme not in CLIENTS and (parts.query or parts.fragment):
        raise InputError(
            f"{remote.address}: an address with a query (?) or a fragment (#) may hold a secret, and index.json would "
            "record it; name the file without one, or download it first. In file:// addresses, write ? as %3F, # as %23"
        )
    if documents.ends_with(remote.address, documents.REFUSED):
        raise InputError(f"{remote.address}: {documents.NOT_SUPPORTED}")
    if documents.ends_with(remote.address, documents.SUFFIXES) or parts.scheme in ("http", "https"):
        return [retrying(_entry, remote)]
    suitable = {n: e for n, e in retrying(remote.entries).items() if documents.ends_with(n, documents.SUFFIXES)}
    if not suitable:
        raise InputError(f"{remote.address} holds no object that ends with {', '.join(documents.SUFFIXES)}")
    # In the order in which paths are sorted.
    names = sorted(suitable, key=lambda name: name.split("/"))
    return [_as_entry(remote.address_of(name), *suitable[name]) for name in names]


def _entry(remote: Remote) -> dict[str, Any]:
    entry = remote.entry("")
    if entry is None:
        raise MissingError(f"{remote.address} is missing")
    return _as_entry(remote.address, *entry)


def _as_entry(path: str, size: int, tag: str | None) -> dict[str, Any]:
    return {"path": path, "bytes": size, **({} if tag is None else {"tag": tag})}
