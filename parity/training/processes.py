"""The processes of one run, and the collective operations that they need."""

import dataclasses
import zlib
from collections.abc import Callable

from parity.errors import InputError


@dataclasses.dataclass(frozen=True)
class Processes:
    """This process's place among the processes of a run.

    The first process writes the run folder, which all processes must be able to read.
    """

    index: int = 0
    count: int = 1
    all_reduce_max: Callable[[int], int] = lambda number: number
    """Collective: return the largest of the integers (below 2**31) that the processes pass."""

    @property
    def first(self) -> bool:
        return self.index == 0

    def barrier(self) -> None:
        """Wait until every process has called this."""
        self.all_reduce_max(0)

    def lost_peer_error(self, reason: str) -> InputError:
        """Return the error of a process that can no longer reach another one; `reason` is the library's message."""
        return InputError(
            f"process {self.index} of {self.count} lost another process, whose own output may say why ({reason}). "
            "Checkpoints saved before are intact: start all processes again with --resume"
        )

    def agree_on(self, text: str) -> bool:
        """Collective: return whether all processes pass the same text."""
        number = zlib.crc32(text.encode()) >> 1
        return [self.all_reduce_max(number), -self.all_reduce_max(-number)] == [number, number]


ALONE = Processes()
"""The only process of its run."""
