"""Downloads that resume, are checked, and are never half there.

A file grows as NAME.part, is checked against its size and sha256, flushed, and renamed. Environment:
GPT_PARITY_CACHE (where), GPT_PARITY_OFFLINE=1 (never open a socket), GPT_PARITY_BASE_URL (where from).
"""

import contextlib
import dataclasses
import functools
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
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from parity.config import PRESETS
from parity.errors import InputError
from parity.weights import n_params

# openai/gpt-2 download_model.py; the second is the mirror of rasbt/LLMs-from-scratch.
MIRRORS = (
    "https://openaipublic.blob.core.windows.net/gpt-2/models",
    "https://f001.backblazeb2.com/file/LLMs-from-scratch/gpt2",
)
SIZES = ("124M", "355M", "774M", "1558M")
DATA = "model.ckpt.data-00000-of-00001"
# OpenAI publishes no hashes. encoder.json and vocab.bpe are pinned by tiktoken too; `checkpoint` and
# hparams.json follow from their content; the others were seen in public repositories.
_SHA256 = {
    "checkpoint": "dd1b025d2e155283f5e300ce95bf6d5b6bc0f7fe010db73daa6975eb896ab9cb",
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "hparams.json": "d9d56e4121c427164e0c55c6f03c08e1daf9002b9b672825112d19097b680318",
    DATA: "2060c885360cc0cf41d7a6dbc4d24b5127aae20260c8b5ae521b5a6578407118",
    "model.ckpt.index": "71916f763f9746f9b2a06b12d91996cf1084ae008d0424543d39391c5f2dc687",
    "model.ckpt.meta": "4668c448fa11531fd6700460487f73e82d3272960cea942252f8744bf225c77b",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_SAME_FOR_ALL = {"checkpoint": 77, "encoder.json": 1_042_301, "vocab.bpe": 456_318}
_LENGTHS = {
    "124M": {"hparams.json": 90, "model.ckpt.index": 5_215, "model.ckpt.meta": 471_155},
    "355M": {"hparams.json": 91, "model.ckpt.index": 10_399, "model.ckpt.meta": 926_519},
}
_CHUNK = 2**16  # what a broken connection loses at most
_LONGEST_WAIT = 30.0


@dataclasses.dataclass(frozen=True)
class Wanted:
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


def model_files(size: str) -> list[Wanted]:
    """The seven files of one of OpenAI's models; raises InputError for an unknown size."""
    if size not in SIZES:
        raise InputError(f"unknown model {size!r}; OpenAI published {', '.join(SIZES)}")
    lengths = {**_SAME_FOR_ALL, **_LENGTHS.get(size, {}), DATA: 4 * n_params(PRESETS[size])}
    known = _SHA256 if size == "124M" else {name: _SHA256[name] for name in _SAME_FOR_ALL}
    return [Wanted(name, lengths.get(name), known.get(name)) for name in _SHA256]


def download_model(
    size: str, folder: Path | None = None, base_urls: Sequence[str] = (), offline: bool | None = None
) -> Path:
    """The folder with OpenAI's files of a model, fetched where they are missing.

    `folder`: by default models/SIZE in the cache. `base_urls`: addresses of folders that hold SIZE/NAME, in the
    order to try. Raises InputError that lists every address and why it failed.
    """
    folder = folder or cache_folder() / "models" / size
    if not base_urls:
        own = os.environ.get("GPT_PARITY_BASE_URL")
        base_urls = (own,) if own else MIRRORS
    columns = (TextColumn("{task.description:32}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    files = model_files(size)
    with Progress(*columns, TimeRemainingColumn()) as progress:
        for wanted in files:
            bar = progress.add_task(wanted.name, total=wanted.size)
            addresses = [f"{base.rstrip('/')}/{size}/{wanted.name}" for base in base_urls]
            fetch(wanted, folder / wanted.name, addresses, offline, functools.partial(_show, progress, bar))
    return folder


def _show(progress: Progress, bar: TaskID, done: int) -> None:
    progress.update(bar, completed=done)


def is_offline() -> bool:
    return os.environ.get("GPT_PARITY_OFFLINE") == "1"


def fetch(
    wanted: Wanted,
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
    if _is_there(wanted, target):
        return target
    if offline if offline is not None else is_offline():
        raise InputError(f"{target} is missing, and downloads are switched off (--offline or GPT_PARITY_OFFLINE=1)")
    target.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    with FileLock(f"{target}.lock"):
        if _is_there(wanted, target):  # another process was faster
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


def _is_there(wanted: Wanted, target: Path) -> bool:
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


def _transfer(wanted: Wanted, target: Path, address: str, on_progress, timeout) -> None:
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


def _problem(wanted: Wanted, part: Path) -> str:
    if wanted.size is not None and (size := part.stat().st_size) != wanted.size:
        return f"{size} bytes, expected {wanted.size}"
    if wanted.sha256 is not None:
        with part.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != wanted.sha256:
            return f"its sha256 is {found}, expected {wanted.sha256}"
    return ""
