"""The files that protocols read: from a path or downloaded once, with their sha256, and single members of archives."""

import contextlib
import dataclasses
import hashlib
import io
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

from parity.errors import InputError
from parity.storage.download import RemoteFile, fetch
from parity.storage.json import as_object, parse
from parity.storage.manifest import file_sha256
from parity.storage.paths import cache_folder

_MOST_BYTES = 2**28  # of a member of an archive
_ZIP, _TAR = (".zip",), (".tgz", ".tar.gz")


@dataclasses.dataclass(frozen=True)
class DataFile:
    """A published file, or a member of a published archive."""

    file: RemoteFile
    addresses: tuple[str, ...]
    """Where it can be downloaded, in the order to try."""
    member: str = ""
    """The path of the member, if the file is an archive."""
    member_sha256: str | None = None
    """The sha256 of the member, if known."""

    @property
    def name(self) -> str:
        """The name of the file that is evaluated."""
        return self.member.rpartition("/")[2] or self.file.name

    @property
    def sha256(self) -> str | None:
        """The sha256 of the file that is evaluated, if known."""
        return self.member_sha256 if self.member else self.file.sha256


class Content(NamedTuple):
    """What a protocol evaluates."""

    data: bytes
    origin: str
    """The path, for messages."""
    sha256: str
    is_published: bool
    """Whether it is the published file, and not another one in its place."""

    def text(self) -> str:
        """Return the content as text; raises InputError if it is not UTF-8."""
        try:
            return self.data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(f"{self.origin} is not UTF-8 text ({error.reason} at byte {error.start})") from None

    def json_lines(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Yield the object of each line, and where it is; raises InputError for a line that holds no JSON object."""
        for number, line in enumerate(io.BytesIO(self.data), 1):
            if line.strip():
                origin = f"{self.origin}, line {number}"
                yield as_object(parse(line, origin, strict=False), origin), origin


def read(file: DataFile, path: Path | None = None, on_progress: Callable[[int], None] = lambda done: None) -> Content:
    """Read the file of a protocol.

    Args:
        file: The published file.
        path: The file on this machine, the archive that contains it, or a folder with either. By default the file is
            downloaded into the cache folder once.
        on_progress: Called with the number of bytes downloaded so far.

    Raises:
        InputError: If it cannot be downloaded, is missing or damaged, or is an archive without the member.
    """
    if path is None:
        target = cache_folder() / "evaluation" / file.file.name
        try:
            source = fetch(file.file, target, file.addresses, on_progress=on_progress)
        except InputError as error:
            raise InputError(f"{error}; or name the file with --data") from None
    else:
        source = _find(file, path)
    is_archive = bool(file.member) and source.name.lower().endswith(_ZIP + _TAR)
    data = _member(source, file.member) if is_archive else _whole(source)
    sha256 = hashlib.sha256(data).hexdigest()
    published = sha256 == file.sha256 or (is_archive and file_sha256(source) == file.file.sha256)
    return Content(data, f"{source}, {file.member}" if is_archive else str(source), sha256, published)


def _find(file: DataFile, path: Path) -> Path:
    """Return the file, or the archive, that a path names."""
    if path.is_file():
        return path
    if not path.is_dir():
        raise InputError(f"--data {path} is neither a file nor a folder")
    names = dict.fromkeys((file.name, file.member or file.name, file.file.name))
    for name in names:
        if (path / name).is_file():
            return path / name
    raise InputError(f"--data {path} holds no {' and no '.join(names)}")


def _whole(path: Path) -> bytes:
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    return path.read_bytes()


def _member(archive: Path, name: str) -> bytes:
    """Read one member of an archive, which is never unpacked."""
    try:
        with contextlib.ExitStack() as stack:
            file: IO[bytes] | None
            if archive.name.lower().endswith(_ZIP):
                file = stack.enter_context(stack.enter_context(zipfile.ZipFile(archive)).open(name))
            else:
                file = stack.enter_context(tarfile.open(archive, "r:gz")).extractfile(name)
            data = b"" if file is None else file.read(_MOST_BYTES + 1)
    except KeyError:
        raise InputError(f"{archive} has no member {name}") from None
    except (zipfile.BadZipFile, tarfile.TarError, EOFError, zlib.error, RuntimeError) as error:
        raise InputError(f"{archive} is truncated or damaged ({error})") from None
    if len(data) > _MOST_BYTES:
        raise InputError(f"{archive}: {name} has more than {_MOST_BYTES:,} bytes")
    return data
