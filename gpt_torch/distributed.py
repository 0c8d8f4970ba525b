"""Several processes as one torch run: torchrun starts them, and torch.distributed joins them."""

import contextlib
import datetime
import os
from collections.abc import Iterator

import torch
from torch import distributed

from parity.errors import InputError
from parity.training.processes import ALONE, JOIN_SECONDS, Processes, abort_with_message, check_address, joining

_TIMEOUT = datetime.timedelta(minutes=10)
"""How long a process waits for the others in a collective operation."""


@contextlib.contextmanager
def processes(join_seconds: float = JOIN_SECONDS) -> Iterator[Processes]:
    """Join the processes that torchrun started.

    On a machine with GPUs, each process uses a GPU of its own.

    Args:
        join_seconds: How long to wait for the others. After that, this process ends with one line and status 2.

    Yields:
        This process's place among the processes of the run; without torchrun, the only one.

    Raises:
        InputError: If the processes do not find each other, or the connection to another one is lost.
    """
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield ALONE
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    _join(join_seconds)
    this = Processes(distributed.get_rank(), distributed.get_world_size(), _all_reduce_max)
    with abort_with_message(this):
        try:
            yield this
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            if not isinstance(error, distributed.DistError) and "gloo" not in reason:
                raise
            raise this.lost_peer_error(reason) from None
        distributed.destroy_process_group()


def _join(seconds: float) -> None:
    """Initialize the default process group from torchrun's environment variables."""
    names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    index, count, host, port = (os.environ.get(name, "") for name in names)
    if missing := [name for name in names if not os.environ.get(name)]:
        raise InputError(f"torchrun sets {', '.join(names)}; missing: {', '.join(missing)}")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise InputError(f"RANK={index} and WORLD_SIZE={count} are not an index from 0 and a number of processes")
    check_address(f"{host}:{port}")
    try:
        with joining(int(index), int(count), f"{host}:{port}", seconds):
            distributed.init_process_group(timeout=_TIMEOUT)  # Gloo for CPUs, NCCL for GPUs
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"process {index} of {count} cannot meet the others at {host}:{port} ({str(error).splitlines()[0]:.300}); "
            "start all of them with torchrun, on a port that no other program uses"
        ) from None


def all_sum(value: torch.Tensor) -> torch.Tensor:
    """Replace a tensor by its sum over all processes, in place, and return it."""
    if distributed.is_initialized():
        distributed.all_reduce(value)
    return value


def all_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows [B, ...] of all processes, which have equally many, in the order of the processes."""
    if not distributed.is_initialized():
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)


def _all_reduce_max(number: int) -> int:
    value = torch.tensor(number)
    distributed.all_reduce(value, distributed.ReduceOp.MAX)
    return int(value)
