"""Downloads that resume, are verified, and appear only when complete.

A file grows as NAME.part, is checked against its size and sha256, flushed, and renamed. Environment variables:
GPT_PARITY_CACHE (the cache folder), GPT_PARITY_OFFLINE=1 (never open a socket), GPT_PARITY_BASE_URL (where from).
"""

import contextlib
import dataclasses
import hashlib
import os
import random
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import requests
from filelock import FileLock
from platformdirs import user_cache_path

from parity.errors import InputError

_CHUNK = 2**16  # bytes; a broken connection loses at most this much
_LONGEST_WAIT = 30.0


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to download."""

    name: str
    size: int | None = None
    """Size in bytes, if known; a file of another size is refused."""
    sha256: str | None = None
    """Hash of the content, if known; a file with another hash is refused."""


class _UnusableError(Exception):
    """This address does not serve the file; another address may."""


class _TransientError(Exception):
    """This address may serve the file later; `wait` is the number of seconds that the server asks to wait, or None."""

    def __init__(self, text: str, wait: float | None = None):
        super().__init__(text)
        self.wait = wait


def cache_folder() -> Path:
    """Return GPT_PARITY_CACHE if it is set, otherwise the platform's cache folder for gpt-parity."""
    return Path(os.environ.get("GPT_PARITY_CACHE") or user_cache_path("gpt-parity"))


def is_offline() -> bool:
    """Return whether GPT_PARITY_OFFLINE=1 forbids downloads."""
    return os.environ.get("GPT_PARITY_OFFLINE") == "1"


def fetch(
    remote: RemoteFile,
    target: Path,
    addresses: Sequence[str],
    offline: bool | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    tries: int = 5,
    timeout: tuple[float, float] = (10, 30),
) -> Path:
    """Download a file from the first address that serves it, unless the file exists already.

    Several processes may fetch the same file at once: one of them downloads it, and the others wait.

    Args:
        remote: The file, with its size and sha256 if known.
        target: Path of the file on disk.
        addresses: URLs of the file, in the order to try.
        offline: Whether to forbid the download; by default as GPT_PARITY_OFFLINE says.
        on_progress: Called with the number of bytes received so far.
        tries: Attempts per address; only failures that may be temporary are retried.
        timeout: Seconds to wait for a connection, and for data on it.

    Returns:
        `target`.

    Raises:
        InputError: If no address serves the file; the message lists each one with its failure. Also if the disk
            has no room for it, or if it is missing while downloads are forbidden.
    """
    if is_complete(remote, target):
        return target
    if offline if offline is not None else is_offline():
        raise InputError(f"{target} is missing, and downloads are forbidden (--offline or GPT_PARITY_OFFLINE=1)")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with FileLock(f"{target}.lock"):
        if is_complete(remote, target):  # another process has downloaded it in the meantime
            return target
        for address in addresses:
            try:
                _with_retries(remote, target, address, on_progress, tries, timeout)
                return target
            except _UnusableError as error:
                failures.append(f"{address}: {error}")
    raise InputError(
        f"{remote.name} could not be downloaded: {'; '.join(failures)}. "
        f"Run again to resume, name another --base-url, or put the file at {target}"
    )


def is_complete(remote: RemoteFile, target: Path) -> bool:
    """Return whether the file exists with the expected size."""
    return target.is_file() and remote.size in (None, target.stat().st_size)


def _with_retries(remote, target, address, on_progress, tries, timeout) -> None:
    for attempt in range(tries):
        try:
            return _transfer(remote, target, address, on_progress, timeout)
        except _TransientError as error:
            if attempt == tries - 1:
                raise _UnusableError(f"{error} ({tries} tries)") from None
            wait = error.wait if error.wait is not None else 0.5 * 2**attempt * random.uniform(0.5, 1.5)
            time.sleep(min(wait, _LONGEST_WAIT))
    return None


def _transfer(remote: RemoteFile, target: Path, address: str, on_progress, timeout) -> None:
    part, tag_file = (target.with_name(f"{target.name}.{end}") for end in ("part", "part.etag"))
    have = part.stat().st_size if part.exists() and tag_file.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()}
    try:
        with requests.get(address, headers=headers, stream=True, timeout=timeout) as answer:
            _check_answer(answer, address, have, part)
            resumed = answer.status_code == 206
            received = have if resumed else 0
            length = answer.headers.get("Content-Length")
            total = received + int(length) if length and length.isdigit() else None
            if None not in (remote.size, total) and total != remote.size:
                raise _UnusableError(f"offers {total} bytes, but {remote.name} has {remote.size}")
            _check_space(target.parent, remote.size or total or 0, received)
            _remember_tag(answer, tag_file)
            with part.open("ab" if resumed else "wb") as file:
                for chunk in answer.iter_content(_CHUNK):
                    file.write(chunk)
                    received += len(chunk)
                    on_progress(received)
                    if remote.size is not None and received > remote.size:
                        break
                file.flush()
                os.fsync(file.fileno())
            if total is not None and received < total:
                raise _TransientError(f"closed the connection after {received} of {total} bytes")
    except requests.RequestException as error:
        raise _TransientError(f"{type(error).__name__}") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()  # on a full disk, give the space back
        raise InputError(
            f"{part} cannot be written ({error.strerror}); it needs {remote.size or 'some'} bytes"
        ) from None
    if problem := _problem(remote, part):
        part.unlink()
        tag_file.unlink(missing_ok=True)
        raise _UnusableError(f"serves another file: {problem}")
    part.replace(target)
    tag_file.unlink(missing_ok=True)


def _check_answer(answer: requests.Response, address: str, have: int, part: Path) -> None:
    if urlsplit(address).scheme == "https" and urlsplit(answer.url).scheme != "https":
        raise _UnusableError("redirects from https to an unencrypted connection")
    status = answer.status_code
    if status == 416:
        part.unlink(missing_ok=True)
        raise _TransientError("refuses to resume (status 416); starting over", wait=0)
    if status == 429 or status >= 500:
        after = answer.headers.get("Retry-After", "")
        raise _TransientError(f"responds with status {status}", float(after) if after.isdigit() else None)
    if status not in (200, 206):
        raise _UnusableError(f"responds with status {status}")
    if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)
        raise _TransientError("resumes at another position; starting over", wait=0)


def _remember_tag(answer: requests.Response, tag_file: Path) -> None:
    """Store the ETag for If-Range; without a strong one, a broken transfer starts over."""
    tag = answer.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        tag_file.write_text(tag)
    else:
        tag_file.unlink(missing_ok=True)


def _check_space(folder: Path, total: int, have: int) -> None:
    free = shutil.disk_usage(folder).free
    if total - have > free:
        raise InputError(f"{folder} has {free:,} bytes free, but the download needs {total - have:,}")


def _problem(remote: RemoteFile, part: Path) -> str:
    """Describe how the downloaded file differs from the expected one; an empty text if it does not."""
    if remote.size is not None and (size := part.stat().st_size) != remote.size:
        return f"{size} bytes, expected {remote.size}"
    if remote.sha256 is not None:
        with part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != remote.sha256:
            return f"its sha256 is {digest}, expected {remote.sha256}"
    return ""
