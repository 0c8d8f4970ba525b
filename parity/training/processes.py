"""The processes of one run, and the little that they must tell each other."""

import dataclasses
import zlib
from collections.abc import Callable

from parity.errors import InputError


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of a run's processes this is. The first writes the run folder, which all of them must see."""

    index: int = 0
    count: int = 1
    all_reduce_max: Callable[[int], int] = lambda number: number
    """The largest of the numbers (below 2**31) that the processes call it with; all of them must."""

    @property
    def first(self) -> bool:
        return self.index == 0

    def barrier(self) -> None:
        """Until every process has come to this line."""
        self.all_reduce_max(0)

    def lost_peer_error(self, reason: str) -> InputError:
        """What a process says that cannot reach another one any more; `reason`: the library's words."""
        return InputError(
            f"process {self.index} of {self.count} lost another one, whose own output may say why ({reason}). "
            "Checkpoints saved before are intact: start all processes again with --resume"
        )

    def agree_on(self, text: str) -> bool:
        """Whether all processes give the same text."""
        number = zlib.crc32(text.encode()) >> 1
        return [self.all_reduce_max(number), -self.all_reduce_max(-number)] == [number, number]


ALONE = Processes()
