"""The processes of one run: how they wait for each other at the start, and the collective operations they need."""

import contextlib
import ctypes
import dataclasses
import hashlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, wait
from typing import TypeVar

from parity.errors import InputError, report_error
from parity.streams import LossyStream

JOIN_SECONDS = 300
"""How long a process waits at the start for the others, by default."""
TURN_SECONDS = 10.0
"""How long the processes wait for the first one in one collective operation. Libraries end a much longer one."""
_RESUME = "Earlier checkpoints are intact: start all processes again with --resume"

Result = TypeVar("Result")


@dataclasses.dataclass(frozen=True)
class JoinArgs:
    """Options of a script by which one of several JAX processes finds the others."""

    distributed: bool = False
    """This is one of several processes of JAX that SLURM, Open MPI or Kubernetes started; JAX detects the others."""
    coordinator: str | None = None
    """Address (HOST:PORT) of process 0, if no scheduler provides it; requires --num-processes and --process-id."""
    num_processes: int | None = None
    """Total number of processes of JAX, if no scheduler provides it; requires --coordinator and --process-id."""
    process_id: int | None = None
    """Index of this process of JAX, from 0, if no scheduler provides it; requires --coordinator and --num-processes."""
    join_timeout: float = JOIN_SECONDS
    """Number of seconds that the processes of a run wait for each other at the start."""

    @property
    def join_options(self) -> tuple[bool, str | None, int | None, int | None, float]:
        """The arguments of gpt_jax.distributed.processes()."""
        return self.distributed, self.coordinator, self.num_processes, self.process_id, self.join_timeout

    def refuse_for_torch(self, script: str) -> None:
        """Raise InputError if an option is given with which only processes of JAX find each other."""
        if self.distributed or not self.coordinator == self.num_processes == self.process_id is None:
            raise InputError(
                "--distributed, --coordinator, --num-processes and --process-id are options of JAX; with --backend "
                f"torch start one process per device: torchrun --nproc-per-node N -- {script} --backend torch"
            )


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's place among the processes of a run.

    The first process writes the run folder, which all processes must be able to read.
    """

    index: int = 0
    count: int = 1
    all_reduce_max: Callable[[int], int] = lambda number: number
    """Collective: return the largest of the integers (between -2**62 and 2**62) that the processes pass."""

    @property
    def first(self) -> bool:
        return self.index == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        self.all_reduce_max(0)

    def wait_for_first(self, is_done: Callable[[float], bool]) -> None:
        """Collective: wait until is_done(seconds), which waits that long itself, returns True on process 0."""
        while self.all_reduce_max(int(self.first and not is_done(TURN_SECONDS))):
            pass

    def first_does(self, action: Callable[[], Result]) -> Result | None:
        """Collective: call a function, which may take hours, on process 0; return its result there, None elsewhere."""
        if self.count == 1:
            return action()
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(action())
            except BaseException as error:
                future.set_exception(error)

        if self.first:
            threading.Thread(target=work, daemon=True).start()
        self.wait_for_first(lambda seconds: future in wait([future], seconds).done)
        return future.result() if self.first else None

    def lost_peer_error(self, reason: str) -> InputError:
        """Return the error of a process that can no longer reach another one; `reason` is the library's message."""
        return InputError(
            f"process {self.index} of {self.count} lost another process, whose own output may say why ({reason}). "
            f"{_RESUME}"
        )

    def agree_on(self, text: str) -> bool:
        """Collective: return whether all processes pass the same text."""
        number = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
        return [self.all_reduce_max(number), -self.all_reduce_max(-number)] == [number, number]

    def differences(self, facts: Mapping[str, str]) -> list[str]:
        """Collective: return the names of those facts whose values differ between the processes."""
        if self.agree_on(repr(sorted(facts.items()))):
            return []
        names = sorted(facts)
        if not self.agree_on(repr(names)):  # then they cannot be compared one by one
            return ["code or libraries"]
        return [name for name in names if not self.agree_on(facts[name])]


ALONE = Processes()
"""The only process of its run."""


@contextlib.contextmanager
def joining(index: int | None, count: int | None, address: str, seconds: float) -> Iterator[None]:
    """Announce that this process waits for the others, and end it with one line if they do not come.

    Libraries end such a process with an abort, or not at all; their waiting cannot be interrupted by an exception.

    Args:
        index: Index of this process; None if only the library knows it.
        count: Number of processes; None if only the library knows it.
        address: Where they meet, HOST:PORT.
        seconds: How long to wait.
    """
    who = "this process" if index is None else f"process {index} of {count}"
    others = "the other processes" if count is None else f"{count} processes"
    LossyStream(sys.stderr).write(f"{who}: waiting up to {seconds:g} s for {others} at {address}\n")

    def give_up() -> None:
        hint = f"; {_reachability(address)}" if index else ""
        report_error(
            InputError(
                f"{who}: not all of {others} came to {address} within {seconds:g} s{hint}. Start all of them within "
                "that time, each with its own index and all with this address; --join-timeout lets them wait longer"
            )
        )
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def check_address(address: str) -> tuple[str, int]:
    """Return (host, port) of HOST:PORT; raises InputError for any other text."""
    host, colon, port = address.rpartition(":")
    if not (host and colon and port.isascii() and port.isdecimal() and 0 < int(port) < 2**16):
        raise InputError(f"{address!r:.200} is not an address HOST:PORT with a port between 1 and 65535")
    return host.strip("[]"), int(port)


def check_port_is_free(address: str) -> None:
    """Raise InputError if another program of this machine listens on the port of HOST:PORT."""
    port = check_address(address)[1]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    try:
        socket.create_server(("", port), family=family, dualstack_ipv6=family == socket.AF_INET6).close()
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else error
        raise InputError(
            f"process 0 cannot listen at {address} ({reason}); choose another port for all processes, "
            "or end the program that holds this one"
        ) from None


@contextlib.contextmanager
def abort_with_message(this: Processes) -> Iterator[None]:
    """Within this context, end this process with one line when a library calls abort().

    The libraries' own threads do so when another process is gone or does not respond. Otherwise the process would end
    with SIGABRT, after messages that name no process and no remedy.
    """

    def end(_: int) -> None:
        report_error(
            InputError(
                f"process {this.index} of {this.count} was aborted by a library, whose messages are above; usually it "
                f"has lost another process. {_RESUME}"
            )
        )
        os._exit(2)

    handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(end)
    c_signal = ctypes.CDLL(None).signal
    c_signal.restype, c_signal.argtypes = ctypes.c_void_p, [ctypes.c_int, ctypes.c_void_p]
    before = c_signal(signal.SIGABRT, ctypes.cast(handler, ctypes.c_void_p))
    try:
        yield
    finally:
        c_signal(signal.SIGABRT, before)


def _reachability(address: str) -> str:
    try:
        with socket.create_connection(check_address(address), timeout=5):
            return "a program listens there, which may not be process 0 of this run"
    except (OSError, InputError) as error:
        return f"nothing listens there ({error})"
