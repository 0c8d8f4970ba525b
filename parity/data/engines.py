"""Engines that do the pieces of work of a preparation: this process, several processes, or a Ray cluster."""

import logging
import multiprocessing
import os
import signal
import socket
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Any, Protocol

from parity.errors import InputError

Calls = Sequence[tuple[Any, ...]]
"""The arguments of each call of a function."""


class Engine(Protocol):
    """Calls a function with many arguments."""

    n_threads: int
    """How many threads a call may use."""

    def map(self, function: Callable[..., Any], calls: Calls) -> Generator[Any, None, None]:
        """Yield the results in the order of the calls.

        If calls fail, the exception of the first of them, in this order, is raised; other calls may have been made.
        """


class ThisProcess:
    """Makes one call after the other in this process.

    Args:
        n_threads: How many threads a call may use.
    """

    def __init__(self, n_threads: int = 1):
        self.n_threads = n_threads

    def map(self, function: Callable[..., Any], calls: Calls) -> Generator[Any, None, None]:
        """See `Engine.map`."""
        return (function(*call) for call in calls)


class Processes:
    """Makes calls in several processes of this machine, which end with this one.

    Args:
        count: Number of processes.
        n_threads: How many threads a call may use.
    """

    def __init__(self, count: int, n_threads: int = 1):
        self.count, self.n_threads = count, n_threads

    def map(self, function: Callable[..., Any], calls: Calls) -> Generator[Any, None, None]:
        """See `Engine.map`.

        Raises:
            InputError: If a process dies.
        """
        context = multiprocessing.get_context("spawn")  # a fork of a process with threads may block
        held, writer = context.Pipe(duplex=False)
        pool = ProcessPoolExecutor(min(self.count, len(calls)) or 1, context, _end_with_parent, (held,))
        try:
            futures = [pool.submit(function, *call) for call in calls]
            for future in futures:
                yield future.result()
        except BrokenProcessPool:
            raise InputError(
                "a process that prepared the corpus died, perhaps for lack of memory; run the same command again to "
                "resume, perhaps with fewer --workers"
            ) from None
        finally:
            writer.close()
            pool.shutdown(cancel_futures=True)
            held.close()


def _end_with_parent(held: Connection) -> None:
    """Let a worker end in the middle of a call when its parent closes the other end of a pipe or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets it as well, decides

    def wait_for_end() -> None:
        held.poll(None)
        os._exit(1)

    threading.Thread(target=wait_for_end, daemon=True).start()


class RayCluster:
    """Makes calls as tasks of a Ray cluster, each on one CPU; a task whose worker or node dies is retried.

    Args:
        address: Address of the cluster; "auto" for the one of this machine, "local" for a new one on this machine.
        n_workers: Number of CPUs of a new cluster.

    Raises:
        InputError: If Ray is not installed, or there is no such cluster.
    """

    n_threads = 1

    def __init__(self, address: str, n_workers: int = 1):
        _check_address(address)
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would otherwise report to its makers
        import ray

        self._ray = ray
        options: dict[str, Any] = {}
        if address == "local":
            options = {"num_cpus": n_workers, "include_dashboard": False}
        try:
            ray.init(address=address, log_to_driver=False, logging_level=logging.WARNING, **options)
        except (ConnectionError, ValueError, RuntimeError, OSError) as error:
            reason = next(iter(str(error).strip().splitlines()), "")
            raise InputError(f"--ray {address}: there is no cluster to connect to ({reason:.300})") from None

    def __enter__(self) -> "RayCluster":
        return self

    def __exit__(self, *_: object) -> None:
        self._ray.shutdown()

    def map(self, function: Callable[..., Any], calls: Calls) -> Generator[Any, None, None]:
        """See `Engine.map`."""
        errors = self._ray.exceptions
        task = self._ray.remote(num_cpus=1, max_retries=_MOST_RETRIES)(function)
        references = [task.remote(*call) for call in calls]
        try:
            for reference in references:
                yield self._ray.get(reference)
        except errors.RayTaskError as error:
            if isinstance(error.cause, InputError | OSError):
                raise error.cause from None
            raise
        except errors.RayError as error:
            reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
            raise InputError(
                f"the Ray cluster did not finish its work ({reason:.300}); run the same command again to resume"
            ) from None


def _check_address(address: str) -> None:
    """Raise InputError unless a cluster may be at the address; Ray itself would end the program."""
    if address in ("auto", "local"):
        return
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        raise InputError(
            f"--ray {address}: give auto, local, or HOST:PORT of the cluster's head, on a machine of the cluster"
        )
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, OverflowError) as error:
        raise InputError(f"--ray {address}: there is no cluster to connect to ({error})") from None


_MOST_RETRIES = 20
