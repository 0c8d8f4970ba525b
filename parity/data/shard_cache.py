"""Shards of a corpus at an address: each is fetched whole when it is first needed, and kept in the cache folder.

All processes of a machine share the folder; a lock per shard lets one of them download it. A shard appears under its
name only when its sha256 has been compared; each process compares it again before it first uses a shard that it has not
fetched itself. When the cache has reached its limit, or the disk is full, the shards that have not been used for the
longest time are deleted.
"""

import contextlib
import os
import queue
import re
import shutil
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import numpy as np

from parity.data.token_files import Tokens, bin_header
from parity.errors import InputError
from parity.storage.locks import waiting_lock
from parity.storage.manifest import hash_file
from parity.storage.paths import cache_folder
from parity.storage.remote import Remote
from parity.storage.retry import retrying_long
from parity.streams import LossyStream

LIMIT_VARIABLE = "GPT_PARITY_CORPUS_CACHE"
_HEADER = len(bin_header(0))
_THREADS = 4
_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


class Shard(NamedTuple):
    """A shard of a prepared folder, as its index.json describes it."""

    name: str
    tokens: int
    sha256: str

    @property
    def size(self) -> int:
        """Size of the file in bytes."""
        return _HEADER + 2 * self.tokens


def corpora_folder() -> Path:
    """Return the folder that holds the cached shards of all corpora, in a folder for each."""
    return cache_folder() / "corpora"


def cache_limit() -> int:
    """Return the number of bytes that cached shards may take, of all corpora together.

    By default this is nine tenths of what the disk has free now, or would have without them.

    Raises:
        InputError: If GPT_PARITY_CORPUS_CACHE is not a size.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip().upper()
    if not text:
        folder = corpora_folder()
        folder.mkdir(parents=True, exist_ok=True)
        return (shutil.disk_usage(folder).free + sum(status.st_size for _, status in _cached(folder))) * 9 // 10
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?) ?([KMGT]?B|)", text)
    if match is None:
        raise InputError(f"{LIMIT_VARIABLE}={text:.40}: give a size such as 500GB, 2TB or a number of bytes")
    return int(float(match[1]) * _UNITS[match[2]])


class ShardCache:
    """The shards of one corpus.

    Args:
        remote: Where they are.
        folder: Where they are kept; its parent holds the other corpora.
    """

    def __init__(self, remote: Remote, folder: Path):
        self.remote, self.folder = remote, folder
        self.limit = cache_limit()
        """Number of bytes that the shards of all corpora together may take, besides those being fetched."""
        self._verified: set[str] = set()
        """The names of the shards whose content this process has compared with their sha256."""
        self._queue: queue.SimpleQueue[tuple[Shard, Future[None]]] = queue.SimpleQueue()
        self._pending: dict[str, Future[None]] = {}
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []

    def read(self, shard: Shard, ids: range) -> np.ndarray:
        """Return ids of a shard, uint16 [length], which is fetched if it is not there.

        Raises:
            RemoteError: If it cannot be fetched, after five minutes of tries, or is damaged.
            InputError: If the disk has no room for it.
        """
        path, begin = self.folder / shard.name, min(ids.start, ids.stop)
        count, offset = max(0, ids.stop - begin), _HEADER + 2 * begin
        while True:
            if shard.name in self._verified:
                with contextlib.suppress(FileNotFoundError), path.open("rb") as file:  # others may delete it
                    if os.fstat(file.fileno()).st_size == shard.size:
                        os.utime(path)  # what was used last is deleted last
                        return np.fromfile(file, "<u2", count, offset=offset)[:: ids.step]
                self._verified.discard(shard.name)
            self._fetched(shard).result()

    def want(self, shards: Iterable[Shard]) -> None:
        """Let shards be fetched or verified on other threads, in this order, as far as half of the cache holds them."""
        room = self.limit // 2
        for shard in shards:
            room -= shard.size
            if room < 0:
                return
            if shard.name not in self._verified or not (self.folder / shard.name).exists():
                self._fetched(shard)

    def _fetched(self, shard: Shard) -> "Future[None]":
        """Return the result of fetching a shard, which begins unless it is under way."""
        with self._lock:
            future = self._pending.get(shard.name)
            if future is None:
                future = self._pending[shard.name] = Future()
                self._queue.put((shard, future))
            if len(self._threads) < _THREADS:
                # Daemons, so that the end of a run does not wait for what no step will read.
                self._threads.append(threading.Thread(target=self._work, daemon=True))
                self._threads[-1].start()
        return future

    def _work(self) -> None:
        while True:
            shard, future = self._queue.get()
            try:
                self._fetch(shard)
            except BaseException as error:
                self._forget(shard)
                future.set_exception(error)
            else:
                self._forget(shard)
                future.set_result(None)

    def _forget(self, shard: Shard) -> None:
        with self._lock:
            del self._pending[shard.name]

    def _fetch(self, shard: Shard) -> None:
        path = self.folder / shard.name
        if not self._is_intact(shard):
            with waiting_lock(path.with_name(f"{path.name}.lock")):
                if not self._is_intact(shard):  # otherwise another process has fetched it in the meantime
                    if path.exists():
                        LossyStream(sys.stderr).write(f"{path} is damaged; it is fetched again\n")
                        path.unlink(missing_ok=True)
                    for part in self.folder.glob(f"{shard.name}.*.part*"):  # of a process that was killed
                        part.unlink(missing_ok=True)
                    retrying_long(self._download, shard, path)
        self._verified.add(shard.name)

    def _is_intact(self, shard: Shard) -> bool:
        """Return whether a shard is cached with its content."""
        path = self.folder / shard.name
        try:
            return path.stat().st_size == shard.size and hash_file(path) == shard.sha256
        except FileNotFoundError:
            return False

    def _download(self, shard: Shard, path: Path) -> None:
        with waiting_lock(self.folder.parent / "room.lock"):
            self.limit = cache_limit()
            make_room(self.folder.parent, self.limit - shard.size, shard.size)
        if (free := shutil.disk_usage(self.folder).free) < shard.size:
            raise InputError(
                f"{self.folder} has {free:,} bytes free, but {self.remote.address}/{shard.name} needs "
                f"{shard.size:,}; make room, or name another folder with GPT_PARITY_CACHE"
            )
        self.remote.get(shard.name, path, shard.sha256)


def make_room(folder: Path, limit: int, free: int = 0) -> None:
    """Delete the cached shards that have not been used for the longest time, as many as necessary.

    Args:
        folder: What corpora_folder() returns.
        limit: Number of bytes that the rest may have, of all corpora together.
        free: Number of bytes that the disk must have free.
    """
    cached = sorted(_cached(folder), key=lambda item: item[1].st_mtime_ns)
    total = sum(status.st_size for _, status in cached)
    for path, status in cached:
        if total <= limit and shutil.disk_usage(folder).free >= free:
            return
        path.unlink(missing_ok=True)
        total -= status.st_size


def _cached(folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in folder.glob("*/*.bin"):
        with contextlib.suppress(FileNotFoundError):  # deleted by another process
            yield path, path.stat()


class RemoteTokens:
    """The token ids of a shard at an address, uint16 [length], or of a part of it.

    Args:
        cache: Where the shard is kept once it has been fetched.
        shard: The shard.
        id_limit: A number that all ids are known to be below.
        part: The ids to use; by default all.
    """

    def __init__(self, cache: ShardCache, shard: Shard, id_limit: int, part: slice = slice(None)):
        self.cache, self.shard, self.id_limit = cache, shard, id_limit
        self._range = range(shard.tokens)[part]

    def __len__(self) -> int:
        return len(self._range)

    def __getitem__(self, part: slice) -> np.ndarray:
        ids = self._range[part]
        return self.cache.read(self.shard, ids) if len(ids) else np.empty(0, np.uint16)

    def part(self, part: slice) -> "RemoteTokens":
        """Return a part of the ids, which is not read yet."""
        ids = self._range[part]
        return RemoteTokens(self.cache, self.shard, self.id_limit, slice(ids.start, ids.stop))


def fetch_ahead(shards: Iterable[Tokens]) -> None:
    """Let those of the shards that are at an address be fetched on other threads, in this order."""
    remote = [tokens for tokens in shards if isinstance(tokens, RemoteTokens)]
    for cache in {id(tokens.cache): tokens.cache for tokens in remote}.values():
        cache.want(tokens.shard for tokens in remote if tokens.cache is cache)
