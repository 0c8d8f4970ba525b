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
from parity.training.processes import ALONE, Processes

_START_SECONDS = 300
_HEARTBEAT_SECONDS = 60
"""A process without a heartbeat for this long counts as dead, which ends the others."""
_LOST_PEER = re.compile("gloo|nccl|coordination|heartbeat", re.IGNORECASE)


@contextlib.contextmanager
def processes(
    detect: bool, coordinator: str | None = None, count: int | None = None, index: int | None = None
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
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the processes of the run do not find each other ({str(error).splitlines()[0]}). --distributed is for "
            f"SLURM, Open MPI and, with the package kubernetes, Kubernetes; elsewhere give {', '.join(given)}"
        ) from None
    this = Processes(jax.process_index(), jax.process_count(), _all_reduce_max)
    try:
        yield this
    except BaseException as error:
        # JAX's exit handlers wait for the other processes, which wait for this one.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(_report(error, this))
    jax.distributed.shutdown()


def _all_reduce_max(number: int) -> int:
    return int(multihost_utils.process_allgather(np.int32(number)).max())


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
