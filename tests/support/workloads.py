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
