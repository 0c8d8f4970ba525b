"""Several processes as one JAX run: how they join through jax.distributed, and how they end together."""

import contextlib
import os
import re
import sys
import traceback
from collections.abc import Iterator

import jax
import numpy as np
from jax.experimental import multihost_utils

from parity.errors import InputError, report_error
from parity.training.processes import (
    ALONE,
    JOIN_SECONDS,
    Processes,
    abort_with_message,
    check_address,
    check_port_is_free,
    joining,
)

_HEARTBEAT_SECONDS = 60
"""A process without a heartbeat for this long counts as dead, which ends the others."""
_LOST_PEER = re.compile("gloo|nccl|coordination|heartbeat", re.IGNORECASE)


@contextlib.contextmanager
def processes(
    detect: bool,
    coordinator: str | None = None,
    count: int | None = None,
    index: int | None = None,
    join_seconds: float = JOIN_SECONDS,
) -> Iterator[Processes]:
    """Join the processes of a run; enter this before JAX sees its devices.

    If an exception leaves the block in one of several processes, that process exits at once, and the others then
    lose it and exit as well.

    Args:
        detect: Whether JAX detects the coordinator, the count and the index, under SLURM, Open MPI or Kubernetes.
        coordinator: HOST:PORT of process 0. Without `detect`, give this, `count` and `index`, or none of the three
            for a run of one process.
        count: Number of processes.
        index: Index of this process, from 0.
        join_seconds: How long to wait for the others. After that, this process ends with one line and status 2.

    Yields:
        This process's place among the processes of the run.

    Raises:
        InputError: For incomplete options, or if the processes do not find each other.
    """
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 and not detect:
        yield ALONE
        return
    if len(missing) != (3 if detect else 0):
        raise InputError(
            "give either --distributed, if SLURM, Open MPI or Kubernetes starts the processes, or all of "
            f"{', '.join(given)}" + f"; missing: {', '.join(missing)}" * (not detect)
        )
    if coordinator is not None and count is not None and index is not None:
        _check(coordinator, count, index)
    try:
        with joining(index, count, coordinator or "the address that --distributed detects", join_seconds):
            jax.distributed.initialize(
                coordinator,
                count,
                index,
                cluster_detection_method=None if detect else "deactivate",
                initialization_timeout=int(join_seconds) + 600,  # at which JAX aborts the process
                heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
            )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of the run do not find each other ({str(error).splitlines()[0]}). --distributed is for "
            f"SLURM, Open MPI and, with the package kubernetes, Kubernetes; elsewhere give {', '.join(given)}"
        ) from None
    this = Processes(jax.process_index(), jax.process_count(), _all_reduce_max)
    with abort_with_message(this):
        try:
            yield this
        except BaseException as error:
            # JAX's exit handlers wait for the other processes, which wait for this one.
            with contextlib.suppress(OSError):
                sys.stdout.flush()
            os._exit(_report(error, this))
        jax.distributed.shutdown()


def _check(coordinator: str, count: int, index: int) -> None:
    """Raise InputError for values with which JAX would wait until the deadline."""
    try:
        check_address(coordinator)
    except InputError as error:
        raise InputError(f"--coordinator: {error}") from None
    if not 1 <= count <= 2**20:
        raise InputError(f"--num-processes must be between 1 and {2**20}, got {count}")
    if not 0 <= index < count:
        raise InputError(f"--process-id must be between 0 and {count - 1}, got {index}")
    if index == 0 and "JAX_COORDINATOR_BIND_ADDRESS" not in os.environ:
        check_port_is_free(coordinator)


def _all_reduce_max(number: int) -> int:
    # Without jax_enable_x64, JAX cuts integers to 32 bits.
    halves = multihost_utils.process_allgather(np.array([number >> 31, number & (2**31 - 1)], np.int32))
    return max((int(high) << 31) + int(low) for high, low in np.reshape(halves, (-1, 2)))


def _report(error: BaseException, this: Processes) -> int:
    """Print an error, and return the exit status."""
    reason = (str(error).splitlines() or [""])[0]
    # XLA raises RuntimeError or ValueError for every kind of failure; only the message says which.
    if isinstance(error, RuntimeError | ValueError) and _LOST_PEER.search(reason):
        error = this.lost_peer_error(reason)
    try:
        return report_error(error)
    except BaseException:
        traceback.print_exc()
        return 1
