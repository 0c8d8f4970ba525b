"""Downloads that resume, are checked, and are never half there.

A file grows as NAME.part, is checked against its size and sha256, flushed, and renamed. Environment:
GPT_PARITY_CACHE (where), GPT_PARITY_OFFLINE=1 (never open a socket), GPT_PARITY_BASE_URL (where from).
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

_CHUNK = 2**16  # what a broken connection loses at most
_LONGEST_WAIT = 30.0


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file to fetch; size and sha256 where they are known."""

    name: str
    size: int | None = None
    sha256: str | None = None


class _UnusableError(Exception):
    """This address will not serve the file; another may."""


class _TransientError(Exception):
    """The same address may serve the file later, `wait` seconds on if it said so."""

    def __init__(self, text: str, wait: float | None = None):
        super().__init__(text)
        self.wait = wait


def cache_folder() -> Path:
    """GPT_PARITY_CACHE where it is set, otherwise the platform's cache folder."""
    return Path(os.environ.get("GPT_PARITY_CACHE") or user_cache_path("gpt-parity"))


def is_offline() -> bool:
    return os.environ.get("GPT_PARITY_OFFLINE") == "1"


def fetch(
    wanted: RemoteFile,
    target: Path,
    addresses: Sequence[str],
    offline: bool | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
    tries: int = 5,
    timeout: tuple[float, float] = (10, 30),
) -> Path:
    """Bring one file to `target` from the first address that serves it; a file that is there already is kept.

    Safe for several processes at once. Raises InputError that lists every address and why it failed.
    """
    if is_complete(wanted, target):
        return target
    if offline if offline is not None else is_offline():
        raise InputError(f"{target} is missing, and downloads are switched off (--offline or GPT_PARITY_OFFLINE=1)")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with FileLock(f"{target}.lock"):
        if is_complete(wanted, target):  # another process was faster
            return target
        for address in addresses:
            try:
                _with_retries(wanted, target, address, on_progress, tries, timeout)
                return target
            except _UnusableError as error:
                failures.append(f"{address}: {error}")
    raise InputError(
        f"{wanted.name} could not be downloaded: {'; '.join(failures)}. "
        f"Run again to resume, name another --base-url, or put the file at {target}"
    )


def is_complete(wanted: RemoteFile, target: Path) -> bool:
    return target.is_file() and wanted.size in (None, target.stat().st_size)


def _with_retries(wanted, target, address, on_progress, tries, timeout) -> None:
    for attempt in range(tries):
        try:
            return _transfer(wanted, target, address, on_progress, timeout)
        except _TransientError as error:
            if attempt == tries - 1:
                raise _UnusableError(f"{error} ({tries} tries)") from None
            wait = error.wait if error.wait is not None else 0.5 * 2**attempt * random.uniform(0.5, 1.5)
            time.sleep(min(wait, _LONGEST_WAIT))
    return None


def _transfer(wanted: RemoteFile, target: Path, address: str, on_progress, timeout) -> None:
    part, tag_file = (target.with_name(f"{target.name}.{end}") for end in ("part", "part.etag"))
    have = part.stat().st_size if part.exists() and tag_file.exists() else 0
    headers = {"Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag_file.read_text()}
    try:
        with requests.get(address, headers=headers, stream=True, timeout=timeout) as answer:
            _check_answer(answer, address, have, part)
            resumed = answer.status_code == 206
            begin = have if resumed else 0
            length = answer.headers.get("Content-Length")
            total = begin + int(length) if length and length.isdigit() else None
            if None not in (wanted.size, total) and total != wanted.size:
                raise _UnusableError(f"offers {total} bytes, {wanted.name} has {wanted.size}")
            _check_space(target.parent, wanted.size or total or 0, begin)
            _remember_tag(answer, tag_file)
            with part.open("ab" if resumed else "wb") as file:
                for chunk in answer.iter_content(_CHUNK):
                    file.write(chunk)
                    begin += len(chunk)
                    on_progress(begin)
                    if wanted.size is not None and begin > wanted.size:
                        break
                file.flush()
                os.fsync(file.fileno())
            if total is not None and begin < total:
                raise _TransientError(f"closed after {begin} of {total} bytes")
    except requests.RequestException as error:
        raise _TransientError(f"{type(error).__name__}") from None
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()  # on a full disk, give the space back
        raise InputError(
            f"{part} cannot be written ({error.strerror}); it needs {wanted.size or 'some'} bytes"
        ) from None
    if problem := _problem(wanted, part):
        part.unlink()
        tag_file.unlink(missing_ok=True)
        raise _UnusableError(f"sent something else: {problem}")
    part.replace(target)
    tag_file.unlink(missing_ok=True)


def _check_answer(answer: requests.Response, address: str, have: int, part: Path) -> None:
    if urlsplit(address).scheme == "https" and urlsplit(answer.url).scheme != "https":
        raise _UnusableError("redirects from https to an open connection")
    status = answer.status_code
    if status == 416:
        part.unlink(missing_ok=True)
        raise _TransientError("cannot resume (416), starting over", wait=0)
    if status == 429 or status >= 500:
        after = answer.headers.get("Retry-After", "")
        raise _TransientError(f"answers {status}", float(after) if after.isdigit() else None)
    if status not in (200, 206):
        raise _UnusableError(f"answers {status}")
    if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)
        raise _TransientError("resumed at another place, starting over", wait=0)


def _remember_tag(answer: requests.Response, tag_file: Path) -> None:
    """Keep what If-Range needs; a weak tag, or none, means that a broken transfer starts over."""
    tag = answer.headers.get("ETag", "")
    if tag and not tag.startswith("W/"):
        tag_file.write_text(tag)
    else:
        tag_file.unlink(missing_ok=True)


def _check_space(folder: Path, total: int, have: int) -> None:
    free = shutil.disk_usage(folder).free
    if total - have > free:
        raise InputError(f"{folder} has {free:,} bytes free, the download needs {total - have:,}")


def _problem(wanted: RemoteFile, part: Path) -> str:
    if wanted.size is not None and (size := part.stat().st_size) != wanted.size:
        return f"{size} bytes, expected {wanted.size}"
    if wanted.sha256 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted.sha256:
            return f"its sha256 is {found}, expected {wanted.sha256}"
    return ""
