"""Workloads that test_benchmark.py measures, in a module that a peer's process imports quickly."""

import os
import time

from measure.timing import Workload

from parity.errors import InputError


def sleep(seconds):
    """Return a workload that reports the id of its process as its device."""
    return Workload(lambda: time.sleep(seconds), lambda: 2_000_000, str(os.getpid()))


def die():
    return Workload(lambda: os._exit(1), lambda: 0, "")


def refuse():
    raise InputError("no such device")


def slow_first_call():
    calls = []

    def call():
        calls.append(1)
        time.sleep(1 if len(calls) == 1 else 0.001)

    return Workload(call, lambda: len(calls), os.environ["DEVICE_NAME"])


def parts(scale=1.0):
    """Return a workload whose calls return the seconds of a slice's parts, more of them each time."""
    calls = []

    def call():
        calls.append(1)
        return {"step": scale * len(calls), "evaluation": 0.5}

    return Workload(call, lambda: 5, "cpu")
