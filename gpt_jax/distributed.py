"""Several processes as one run: jax.distributed, and how they end together."""

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
_SILENT_SECONDS = 60
"""A process that sends no sign of life for so long is taken for dead, which ends the others."""
_LOST = re.compile("gloo|nccl|coordination|heartbeat", re.IGNORECASE)


@contextlib.contextmanager
def processes(
    detect: bool, coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> Iterator[Processes]:
    """This process as one of a run's, to be entered before JAX sees its devices.

    `detect`: SLURM, Open MPI or Kubernetes tell JAX who coordinates, how many there are and which this is. Else
    all three are given, or none for a run of one process. An error in one of several processes ends it at once,
    and by that the others.

    Raises InputError for options that are not complete, and for processes that do not find each other.
    """
    given = {"--coordinator": coordinator, "--num-processes": count, "--process-id": index}
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == 3 and not detect:
        yield ALONE
        return
    if len(missing) != (3 if detect else 0):
        raise InputError(
            "give either --distributed, where SLURM, Open MPI or Kubernetes start the processes, or all "
            f"of {', '.join(given)}" + f"; missing: {', '.join(missing)}" * (not detect)
        )
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=None if detect else "deactivate",
            initialization_timeout=_START_SECONDS,
            heartbeat_timeout_seconds=_SILENT_SECONDS,
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
        # JAX's own way out waits for the others, who wait for this one.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(_tell(error, this))
    jax.distributed.shutdown()


def _all_reduce_max(number: int) -> int:
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def _tell(error: BaseException, this: Processes) -> int:
    reason = (str(error).splitlines() or [""])[0]
    # XLA's errors come as RuntimeError or ValueError, whatever they are about.
    if isinstance(error, RuntimeError | ValueError) and _LOST.search(reason):
        error = this.lost_peer_error(reason)
    try:
        return report_error(error)
    except BaseException:
        traceback.print_exc()
        return 1
