"""How many processes of pytest-xdist run tests at the same time."""

import os
from pathlib import Path

from parity.parts import usable_cores

MOST = 4
MEMORY = 5e9
"""Largest memory of a process in bytes."""


def count_workers(cores: int, memory: float) -> int:
    """Return the number of processes for a number of cores and the memory of the machine in bytes."""
    return max(1, min(MOST, cores, int(memory // MEMORY)))


def workers_here() -> int:
    """Return the number of processes for this machine, or for the container that this process is in."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdecimal():
        memory = min(memory, int(text))
    return count_workers(usable_cores(), memory)
