"""Time workloads in turn, each in a process of its own, so that they share no memory, threads or GPU pool."""

import contextlib
import multiprocessing
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

from rich.progress import track

from parity.console import PlainConsole
from parity.errors import InputError


class Workload(NamedTuple):
    """What a peer's process runs."""

    call: Callable[[], Any]
    """Does one unit of work, and returns when it is done."""
    peak: Callable[[], int]
    """Returns the peak memory so far in bytes, of the GPU or of this process."""
    device: str


class Spec(NamedTuple):
    """How a peer's process makes its workload."""

    make: Callable[..., Workload]
    arguments: tuple[Any, ...] = ()
    environment: Mapping[str, str] = {}
    """Environment variables, set before any framework is imported."""


class Timings(NamedTuple):
    """The measured calls of one peer."""

    seconds: list[float]
    peak: int
    """Peak memory in bytes; 0 if unknown."""
    device: str
    failure: str = ""
    """Why the peer was not measured; empty if it was."""

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @classmethod
    def merge(cls, runs: Sequence["Timings"]) -> "Timings":
        """Join the timings of one peer from several processes."""
        return cls([s for run in runs for s in run.seconds], max(run.peak for run in runs), runs[0].device)


class Peer:
    """A workload in a process of its own, which is idle while other peers have their turn."""

    def __init__(self, name: str, spec: Spec):
        self.name = name
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        try:
            self.device = self._run(_start, *spec)
        except BaseException:
            # The garbage collector would close a pipe that concurrent.futures writes to at exit.
            self._pool.shutdown()
            raise

    def __enter__(self) -> "Peer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()

    def time_calls(self, count: int) -> list[float]:
        """Return the seconds of each of `count` calls."""
        return self._run(_time_calls, count)

    def call(self) -> Any:
        """Return the result of one call."""
        return self._run(_call)

    def peak(self) -> int:
        return self._run(_peak)

    def _run(self, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return self._pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            raise InputError(
                f"the process of {self.name} died, perhaps for lack of memory; try a smaller size"
            ) from None


_REFERENCE, _REFERENCE_CALLS = "reference", 10


def interleave(
    specs: Mapping[str, Spec], rounds: int, calls: int, reference: Spec | None = None
) -> tuple[dict[str, Timings], Timings]:
    """Time all peers in turn, round after round; one more round at the start warms up and is not counted.

    A peer that fails is left out from then on, except the first one, whose error is raised.

    Args:
        specs: Workload of each peer.
        rounds: Number of counted rounds.
        calls: Calls of each peer per round.
        reference: A workload that measures the limit of the machine; it is called ten times per round.

    Returns:
        The timings of each peer and those of the reference, which are empty without one.
    """
    counts = dict.fromkeys(specs, calls)
    if reference is not None:
        specs, counts = {**specs, _REFERENCE: reference}, {**counts, _REFERENCE: _REFERENCE_CALLS}
    console = PlainConsole(stderr=True, lossy=True)
    peers: dict[str, Peer] = {}
    seconds: dict[str, list[float]] = {name: [] for name in specs}
    failures: dict[str, str] = {}

    @contextlib.contextmanager
    def attempting(name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # of any framework
            if name == next(iter(specs)):
                raise
            reason = next(iter(str(error).strip().splitlines()), "")
            failures[name] = f"{type(error).__name__}: {reason:.200}"

    with contextlib.ExitStack() as stack:
        for name, spec in track(specs.items(), "starting", transient=True, console=console):
            with attempting(name):
                peers[name] = stack.enter_context(Peer(name, spec))
        for is_counted in track([False] + [True] * rounds, "measuring", transient=True, console=console):
            for name, peer in peers.items():
                if name not in failures:
                    with attempting(name):
                        new = peer.time_calls(counts[name])
                        if is_counted:
                            seconds[name] += new
        timings = {name: Timings([], 0, "", failure) for name, failure in failures.items()}
        timings |= {n: Timings(seconds[n], peer.peak(), peer.device) for n, peer in peers.items() if n not in failures}
        ordered = {name: timings[name] for name in specs}
        return ordered, ordered.pop(_REFERENCE, Timings([], 0, ""))


def first_calls(specs: Mapping[str, Spec], rounds: int) -> dict[str, Timings]:
    """Time the first call of each peer, in a new process each time; the peers take turns."""
    runs: dict[str, list[Timings]] = {name: [] for name in specs}
    console = PlainConsole(stderr=True, lossy=True)
    for _ in track(range(rounds), "measuring", transient=True, console=console):
        for name, spec in specs.items():
            with Peer(name, spec) as peer:
                runs[name].append(Timings(peer.time_calls(1), peer.peak(), peer.device))
    return {name: Timings.merge(of_peer) for name, of_peer in runs.items()}


# In the peer's process

_workload: Workload


def _start(make: Callable[..., Workload], arguments: Sequence[Any], environment: Mapping[str, str]) -> str:
    global _workload
    os.environ.update(environment)  # before a framework is imported
    _workload = make(*arguments)
    return _workload.device


def _time_calls(count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        begin = time.perf_counter()
        _workload.call()
        seconds.append(time.perf_counter() - begin)
    return seconds


def _call() -> Any:
    return _workload.call()


def _peak() -> int:
    return _workload.peak()


def peak_resident() -> int:
    """Peak resident memory of this process in bytes (Linux's VmHWM); 0 on other systems."""
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if os.path.exists(status) else None
    return 1024 * int(match[1]) if match else 0
