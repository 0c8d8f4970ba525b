"""Peers that take turns, each in a process of its own: neither memory, threads nor a GPU's pool are shared."""

import contextlib
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

from rich.progress import track

from parity.errors import InputError


class Subject(NamedTuple):
    """What a peer's process holds."""

    call: Callable[[], Any]
    """One unit of work, and the wait for it"""
    peak: Callable[[], int]
    """Most bytes so far, of the GPU or of this process"""
    device: str


Make = tuple[Callable[..., Subject], tuple[Any, ...], Mapping[str, str]]
"""A subject's maker, its arguments, and the environment of its process"""


class Peer:
    """A subject in a process of its own, which stands still while others have their turn."""

    def __init__(self, name: str, make: Make):
        self.name = name
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self.device = self._ask(_make, *make)
        except BaseException:
            # Left to the garbage collector, its thread closes a pipe that concurrent.futures writes to at exit.
            self._pool.shutdown()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def calls(self, count: int) -> list[float]:
        """Seconds of each."""
        return self._ask(_calls, count)

    def peak(self) -> int:
        return self._ask(_peak)

    def _ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise InputError(f"{self.name}: its process died, perhaps for want of memory; try a smaller size") from None


class Figures(NamedTuple):
    seconds: list[float]
    """Of each call that counts"""
    peak: int
    device: str

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @classmethod
    def of(cls, runs: Sequence["Figures"]) -> "Figures":
        """One peer's, of several processes."""
        return cls([s for run in runs for s in run.seconds], max(run.peak for run in runs), runs[0].device)


_METER, _METER_CALLS = "the meter", 10


def alternate(
    peers: Mapping[str, Make], rounds: int, calls: int, meter: Make | None = None
) -> tuple[dict[str, Figures], Figures]:
    """Calls of all peers, in turns of so many, and ten of a meter; the first round warms up and does not count."""
    counts = dict.fromkeys(peers, calls)
    if meter is not None:
        peers, counts = {**peers, _METER: meter}, {**counts, _METER: _METER_CALLS}
    with contextlib.ExitStack() as stack:
        started = [
            stack.enter_context(Peer(name, make)) for name, make in track(peers.items(), "starting", transient=True)
        ]
        seconds: dict[str, list[float]] = {name: [] for name in peers}
        for counting in track([False] + [True] * rounds, "measuring", transient=True):
            for peer in started:
                found = peer.calls(counts[peer.name])
                if counting:
                    seconds[peer.name] += found
        figures = {peer.name: Figures(seconds[peer.name], peer.peak(), peer.device) for peer in started}
        return figures, figures.pop(_METER, Figures([], 0, ""))


def once(peers: Mapping[str, Make], rounds: int) -> dict[str, Figures]:
    """The first call of each peer, in a new process each time, in turns."""
    found: dict[str, list[Figures]] = {name: [] for name in peers}
    for _ in track(range(rounds), "measuring", transient=True):
        for name, make in peers.items():
            with Peer(name, make) as peer:
                found[name].append(Figures(peer.calls(1), peer.peak(), peer.device))
    return {name: Figures.of(runs) for name, runs in found.items()}


# In the peer's process

_subject: Subject


def _make(make: Callable[..., Subject], arguments: Sequence[Any], environment: Mapping[str, str]) -> str:
    global _subject
    os.environ.update(environment)  # before a framework is imported
    _subject = make(*arguments)
    return _subject.device


def _calls(count: int) -> list[float]:
    found = []
    for _ in range(count):
        begin = time.perf_counter()
        _subject.call()
        found.append(time.perf_counter() - begin)
    return found


def _peak() -> int:
    return _subject.peak()
