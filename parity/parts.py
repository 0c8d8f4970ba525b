"""Work that is divided: into parts for processes or machines of their own (--part k/n), and among CPU cores."""

import dataclasses
import os
import re

from parity.errors import InputError

MOST = 100_000


@dataclasses.dataclass(frozen=True)
class Part:
    """Part `index` of `count`; the first one is part 0."""

    index: int
    count: int

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"

    @property
    def label(self) -> str:
        """The part in the name of a file or folder: in the order of the names, all parts together are the whole."""
        return f"{self.index:05}-of-{self.count:05}"

    def of(self, n: int) -> range:
        """Return the indices of this part of n things: adjacent ones, as many as in any other part, or one more."""
        return range(self.index * n // self.count, (self.index + 1) * n // self.count)


def parse_part(text: str) -> Part:
    """Return the part that `--part k/n` names.

    Raises:
        InputError: Unless it is k/n with k in 0..n-1.
    """
    match = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    part = Part(int(match[1]), int(match[2])) if match else Part(0, 0)
    if not part.index < part.count <= MOST:
        raise InputError(f"--part {text:.40}: give k/n, such as 0/4 for the first of 4 parts; k counts from 0 to n - 1")
    return part


def usable_cores() -> int:
    """Return the number of CPU cores that this process may use, which a scheduler may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
