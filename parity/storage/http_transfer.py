"""One HTTP transfer into a file, resumed where an earlier one ended. Nothing that a server sends is trusted."""

import contextlib
import datetime
import email.utils
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import requests
import urllib3

from parity.errors import InputError, printable

_CHUNK = 2**16  # bytes
_MOST_BYTES = 2**26  # of a file whose size is not known
_LEAST_RATE, _RATE_WINDOW = 1000, 60.0  # bytes per second, in each window of this many seconds
_USER_AGENT = "gpt-parity"  # some servers refuse those of HTTP libraries
_STRONG_TAG = re.compile(rb'"[\x21\x23-\x7e]{0,1000}"')


class UnusableError(Exception):
    """This address does not serve the file; another address may."""


class TransientError(Exception):
    """This address may serve the file later; `wait` is the number of seconds that the server asks to wait, or None."""

    def __init__(self, text: str, wait: float | None = None):
        super().__init__(text)
        self.wait = wait


class Answer(NamedTuple):
    """What a server says about a file."""

    size: int | None
    """Its size in bytes, if the server states it."""
    tag: str | None
    """Its strong entity tag, if there is one."""


def inquire(address: str, timeout: tuple[float, float] = (10, 30)) -> Answer | None:
    """Ask a server for size and entity tag of a file; None if it does not have the file.

    The request is a GET whose content is not read, because signed addresses allow nothing else.

    Raises:
        UnusableError: If the server refuses, or its response is malformed.
        TransientError: If the request failed, but may succeed later.
    """
    headers = {"Accept-Encoding": "identity", "User-Agent": _USER_AGENT}
    with _named_errors(), requests.get(address, headers=headers, stream=True, timeout=timeout) as answer:
        if answer.status_code in (404, 410):
            return None
        _check_status(answer, address)
        tag = answer.headers.get("ETag", "")
        is_strong = _STRONG_TAG.fullmatch(tag.encode("latin-1", errors="replace"))
        return Answer(_natural(answer.headers.get("Content-Length", "")), tag if is_strong else None)


def receive(
    address: str,
    part: Path,
    tag_file: Path,
    size: int | None,
    timeout: tuple[float, float],
    on_progress: Callable[[int], None],
    check_space: Callable[[int, int], None],
) -> None:
    """Receive a file from a server, or the rest of it.

    Args:
        address: URL of the file.
        part: The file to write. What it holds already is kept if `tag_file` says that it is of the same file.
        tag_file: Holds the server's ETag of the file, for If-Range; without a strong one, a transfer starts over.
        size: Size of the file in bytes, if known.
        timeout: Seconds to wait for a connection, and for data on it.
        on_progress: Called with the number of bytes received so far.
        check_space: Called with the size of the whole file and the number of bytes already received, before anything
            is written.

    Raises:
        UnusableError: If the server does not have the file, or its response is malformed.
        TransientError: If the transfer was refused or broke off, but may succeed later.
        InputError: If the file cannot be written.
    """
    limit = _MOST_BYTES if size is None else size
    tag = _stored_tag(tag_file)
    have = part.stat().st_size if tag and part.is_file() else 0
    have = have if have < limit else 0
    headers = {"Accept-Encoding": "identity", "User-Agent": _USER_AGENT}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": tag}
    with _named_errors(), requests.get(address, headers=headers, stream=True, timeout=timeout) as answer:
        _check_answer(answer, address, have, part)
        resumed = answer.status_code == 206 and have > 0
        received = have if resumed else 0
        length = _natural(answer.headers.get("Content-Length", ""))
        total = None if length is None else received + length
        _check_size(total, size)
        check_space(size or total or 0, received)
        with _writing(part):
            _store_tag(answer, tag_file)
            with part.open("ab" if resumed else "wb") as file:
                for chunk in _chunks(answer):
                    file.write(chunk)
                    received += len(chunk)
                    on_progress(received)
                    if received > limit:
                        raise UnusableError(f"sends more than {limit:,} bytes")
                file.flush()
                os.fsync(file.fileno())
        if total is not None and received < total:
            raise TransientError(f"closed the connection after {received} of {total} bytes")


@contextlib.contextmanager
def _named_errors() -> Iterator[None]:
    """Raise UnusableError or TransientError for the errors of requests and of the connection."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, requests.TooManyRedirects) as error:  # in the answer, or the address that it redirects to
        raise UnusableError(f"sends a malformed response ({printable(str(error), 200)})") from None
    except (OSError, urllib3.exceptions.HTTPError) as error:
        raise TransientError(f"{type(error).__name__}") from None


def _chunks(answer: requests.Response) -> Iterator[bytes]:
    """Yield what arrives as soon as it arrives; raise TransientError if it arrives too slowly."""
    started, count = time.monotonic(), 0
    while True:
        try:
            chunk = answer.raw.read1(_CHUNK, decode_content=False)
        except OSError as error:  # of the connection, not of the disk
            raise TransientError(f"{type(error).__name__}") from None
        if not chunk:
            return
        yield chunk
        count += len(chunk)
        elapsed = time.monotonic() - started
        if elapsed >= _RATE_WINDOW:
            if count < _LEAST_RATE * elapsed:
                raise TransientError(f"sends fewer than {_LEAST_RATE:,} bytes per second")
            started, count = time.monotonic(), 0


@contextlib.contextmanager
def _writing(part: Path) -> Iterator[None]:
    """Raise InputError if a file cannot be written."""
    try:
        yield
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()  # on a full disk, give the space back
        raise InputError(f"{part} cannot be written ({error.strerror}); make room, or name another folder") from None


def _check_answer(answer: requests.Response, address: str, have: int, part: Path) -> None:
    status = answer.status_code
    if status == 416:
        part.unlink(missing_ok=True)
        raise TransientError("refuses to resume (status 416); starting over", wait=0)
    _check_status(answer, address)
    if status == 206 and not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        part.unlink(missing_ok=True)
        raise TransientError("resumes at another position; starting over", wait=0)


def _check_status(answer: requests.Response, address: str) -> None:
    """Raise UnusableError or TransientError for an answer that is not the file."""
    if urlsplit(address).scheme == "https" and urlsplit(answer.url).scheme != "https":
        raise UnusableError("redirects from https to an unencrypted connection")
    status = answer.status_code
    if status == 429 or status >= 500:
        raise TransientError(f"responds with status {status}", _seconds(answer.headers.get("Retry-After", "")))
    if status not in (200, 206):
        raise UnusableError(f"responds with status {status}")
    encoding = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise UnusableError(f"sends the file compressed ({printable(encoding, 40)}), although it was asked not to")


def _check_size(total: int | None, size: int | None) -> None:
    """Raise UnusableError if a file has another size than expected, or is far too large."""
    if total is None:
        return
    if size is not None and total != size:
        raise UnusableError(f"offers {total} bytes, but the file has {size}")
    if size is None and total > _MOST_BYTES:
        raise UnusableError(f"offers {total} bytes, which are too many for this file")


def _natural(text: str) -> int | None:
    """Return the number that a header states, or None if it is not one."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) <= 18 else None


def _seconds(retry_after: str) -> float | None:
    """Return the seconds of a header Retry-After, which states them or a date; None for anything else."""
    seconds = _natural(retry_after)
    if seconds is not None:
        return float(seconds)
    try:
        date = email.utils.parsedate_to_datetime(retry_after)
        return max(0.0, (date - datetime.datetime.now(datetime.UTC)).total_seconds())
    except (ValueError, TypeError, OverflowError):  # TypeError: a date without a time zone
        return None


def _stored_tag(tag_file: Path) -> str:
    """Return the stored ETag; an empty text if there is none or it is damaged."""
    try:
        content = tag_file.read_bytes()
    except OSError:
        return ""
    return content.decode("ascii") if _STRONG_TAG.fullmatch(content) else ""


def _store_tag(answer: requests.Response, tag_file: Path) -> None:
    tag = answer.headers.get("ETag", "").encode("latin-1", errors="replace")
    if _STRONG_TAG.fullmatch(tag):
        tag_file.write_bytes(tag)
    else:
        tag_file.unlink(missing_ok=True)
