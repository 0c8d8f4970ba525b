"""Workloads that test_benchmark.py measures, in a module that a peer's process imports quickly."""

import os
from types import SimpleNamespace

from measure import timing
from measure.timing import Workload

from parity.errors import InputError


def timed(seconds):
    """Return a workload whose calls take the next of these seconds, the last again and again, by a clock of its own.

    The clock replaces that of its process, whose id is reported as the device; the peak is the number of calls.
    """
    clock, calls = [0.0], []

    def call():
        clock[0] += seconds[min(len(calls), len(seconds) - 1)]
        calls.append(1)

    timing.time = SimpleNamespace(perf_counter=lambda: clock[0])
    return Workload(call, lambda: len(calls), os.environ.get("DEVICE_NAME", str(os.getpid())))


def die():
    return Workload(lambda: os._exit(1), lambda: 0, "")


def refuse():
    raise InputError("no such device")


def parts(scale=1.0):
    """Return a workload whose calls return the seconds of a slice's parts, more of them each time."""
    calls = []

    def call():
        calls.append(1)
        return {"step": scale * len(calls), "evaluation": 0.5}

    return Workload(call, lambda: 5, "cpu")
