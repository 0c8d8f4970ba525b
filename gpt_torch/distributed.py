"""Several processes as one torch run: torchrun starts them, and torch.distributed joins them."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
from torch import distributed

from parity.training.processes import ALONE, Processes

_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others in a collective operation."""


@contextlib.contextmanager
def processes() -> Iterator[Processes]:
    """Join the processes that torchrun started.

    On a machine with GPUs, each process uses a GPU of its own.

    Yields:
        This process's place among the processes of the run; without torchrun, the only one.

    Raises:
        InputError: If the connection to another process of the run is lost.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group(timeout=_TIMEOUT)  # Gloo for CPUs, NCCL for GPUs
    this = Processes(distributed.get_rank(), distributed.get_world_size(), _all_reduce_max)
    try:
        yield this
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        if not isinstance(error, distributed.DistError) and "gloo" not in reason:
            raise
        raise this.lost_peer_error(reason) from None
    distributed.destroy_process_group()


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all processes, in place, and return it."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


def _all_reduce_max(number: int) -> int:
    value = torch.tensor(number)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)
