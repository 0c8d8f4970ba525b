"""Downloads that resume, are verified, and appear only when complete.

A file grows as NAME.part, is flushed and checked, and renamed. NAME.verified records that it was checked, so that a
large file is not read again each time that it is used. Environment variables: GPT_PARITY_CACHE (the cache folder),
GPT_PARITY_OFFLINE (never open a socket), GPT_PARITY_BASE_URL (where from).
"""

import contextlib
import dataclasses
import os
import random
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from filelock import FileLock, Timeout

from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.http_transfer import TransientError, UnusableError, receive
from parity.storage.manifest import file_sha256
from parity.storage.paths import is_offline
from parity.streams import LossyStream

# The first is the address in openai/gpt-2's download_model.py, the second a mirror of rasbt/LLMs-from-scratch.
OPENAI_MIRRORS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
"""Addresses of folders that hold OpenAI's files as SIZE/NAME."""

_LONGEST_WAIT = 30.0  # seconds between two tries
_SILENT_WAIT = 5.0  # seconds


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to download."""

    name: str
    size: int | None = None
    """Size in bytes, if known; a file of another size is refused."""
    sha256: str | None = None
    """Hash of the content, if known; a file with another hash is refused."""
    check: Callable[[Path], None] | None = None
    """Checks the content where no hash is known: raises InputError for a file that is not what its name says."""


def openai_addresses(file: str, base_urls: Sequence[str] = ()) -> list[str]:
    """Return where to download one of OpenAI's files from, in the order to try.

    Args:
        file: SIZE/NAME.
        base_urls: Addresses of folders; by default GPT_PARITY_BASE_URL if it is set, otherwise OPENAI_MIRRORS.
    """
    own = os.environ.get("GPT_PARITY_BASE_URL")
    return [f"{base.rstrip('/')}/{file}" for base in base_urls or ((own,) if own else OPENAI_MIRRORS)]


def fetch(
    remote: RemoteFile,
    target: Path,
    addresses: Sequence[str],
    offline: bool | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    tries: int = 5,
    timeout: tuple[float, float] = (10, 30),
    recheck: bool = False,
) -> Path:
    """Download a file from the first address that serves it, unless the file exists already.

    A file that exists is checked before it is trusted. Several processes may fetch the same file at once: one of them
    downloads it, and the others wait.

    Args:
        remote: The file, with its size and sha256 if known.
        target: Path of the file on disk.
        addresses: URLs of the file, in the order to try.
        offline: Whether to forbid the download; by default as GPT_PARITY_OFFLINE says.
        on_progress: Called with the number of bytes received so far.
        tries: Attempts per address; only failures that may be temporary are retried.
        timeout: Seconds to wait for a connection, and for data on it.
        recheck: Whether to read a file that exists even if it has not changed since it was last checked.

    Returns:
        `target`.

    Raises:
        InputError: If the file exists but is not the expected one; if no address serves it (the message lists each one
            with its failure); if the disk has no room for it; or if it is missing while downloads are forbidden.
    """
    if target.exists():
        _check_existing(remote, target, recheck)
        return target
    if offline if offline is not None else is_offline():
        raise InputError(f"{target} is missing, and downloads are forbidden (--offline or GPT_PARITY_OFFLINE)")
    failures = []
    with _lock(target):
        if target.exists():  # another process has downloaded it in the meantime
            _check_existing(remote, target)
            return target
        for address in addresses:
            try:
                transfer(remote, target, address, on_progress, tries, timeout)
                return target
            except UnusableError as error:
                failures.append(f"{address}: {error}")
    raise InputError(
        f"{remote.name} could not be downloaded: {'; '.join(failures)}. "
        f"Run again to resume, name another --base-url, or put the file at {target}"
    )


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[None]:
    """Make the folder of a file, and allow no other process to download the file."""
    lock = FileLock(f"{target}.lock")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=_SILENT_WAIT)
        except Timeout:
            LossyStream(sys.stderr).write(f"waiting for another process that downloads {target}\n")
            lock.acquire()
    except (OSError, NotImplementedError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{target.parent} cannot be written ({reason}); name another folder") from None
    try:
        yield
    finally:
        lock.release()


def _check_existing(remote: RemoteFile, target: Path, recheck: bool = False) -> None:
    """Raise InputError unless a file is the expected one, as far as that is known."""
    try:
        if not recheck and _is_remembered(remote, target):
            return
        problem = _problem(remote, target)
    except OSError as error:
        problem = f"it cannot be read ({error.strerror})"
    if problem:
        raise InputError(f"{target} is damaged or is another file: {problem}. Delete it, and run again to download it")
    _remember(remote, target)


def _problem(remote: RemoteFile, file: Path) -> str:
    """Describe how a file differs from the expected one; an empty text if it does not."""
    if not file.is_file():
        return "it is not a file"
    if remote.size is not None and (size := file.stat().st_size) != remote.size:
        return f"it has {size:,} bytes, expected {remote.size:,}"
    if remote.sha256 is not None:
        digest = file_sha256(file)
        if digest != remote.sha256:
            return f"its sha256 is {digest}, expected {remote.sha256}"
    elif remote.check is not None:
        try:
            remote.check(file)
        except InputError as error:
            return str(error)
    return ""


def _verified(target: Path) -> Path:
    return target.with_name(f"{target.name}.verified")


def _state(remote: RemoteFile, target: Path) -> str:
    """What was verified: the file as it is now, and against what."""
    status = target.stat()
    return f"{status.st_size} {status.st_mtime_ns} {remote.sha256 or 'structure'}\n"


def _is_remembered(remote: RemoteFile, target: Path) -> bool:
    try:
        return _verified(target).read_bytes() == _state(remote, target).encode()
    except OSError:
        return False


def _remember(remote: RemoteFile, target: Path) -> None:
    if remote.sha256 is not None or remote.check is not None:
        with contextlib.suppress(OSError):  # a folder that cannot be written is checked each time
            replace_text(_verified(target), _state(remote, target))


def transfer(
    remote: RemoteFile,
    target: Path,
    address: str,
    on_progress: Callable[[int], None] = lambda done: None,
    tries: int = 5,
    timeout: tuple[float, float] = (10, 30),
) -> None:
    """Download a file from one address, without a lock; the arguments are those of `fetch`.

    Raises:
        UnusableError: If the address does not serve the file, after all tries.
        InputError: If the file cannot be written.
    """
    for attempt in range(tries):
        try:
            return _transfer(remote, target, address, on_progress, timeout)
        except TransientError as error:
            if attempt == tries - 1:
                raise UnusableError(f"{error} ({tries} tries)") from None
            wait = error.wait if error.wait is not None else 0.5 * 2**attempt * random.uniform(0.5, 1.5)
            time.sleep(min(wait, _LONGEST_WAIT))
    return None


def _transfer(
    remote: RemoteFile,
    target: Path,
    address: str,
    on_progress: Callable[[int], None],
    timeout: tuple[float, float],
) -> None:
    """Receive NAME.part, or the rest of it, and give it its name if it is the expected file."""
    part, tag_file = (target.with_name(f"{target.name}.{end}") for end in ("part", "part.etag"))

    def check_space(total: int, received: int) -> None:
        free = shutil.disk_usage(target.parent).free
        if total - received > free:
            raise InputError(f"{target.parent} has {free:,} bytes free, but the download needs {total - received:,}")

    is_whole = remote.size is not None and part.is_file() and part.stat().st_size == remote.size
    if not is_whole or _problem(remote, part):  # whole but without its name: killed between the two
        receive(address, part, tag_file, remote.size, timeout, on_progress, check_space)
    if problem := _problem(remote, part):
        part.unlink()
        tag_file.unlink(missing_ok=True)
        raise UnusableError(f"serves another file: {problem}")
    part.replace(target)
    tag_file.unlink(missing_ok=True)
    _remember(remote, target)
