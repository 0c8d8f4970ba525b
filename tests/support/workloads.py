"""What test_benchmark.py measures, in a module that a peer's process imports quickly."""

import os
import time

from measure.turns import Subject

from parity.errors import InputError


def sleeper(seconds):
    """Says in which process it is, as its device."""
    return Subject(lambda: time.sleep(seconds), lambda: 2_000_000, str(os.getpid()))


def deserter():
    return Subject(lambda: os._exit(1), lambda: 0, "")


def refuser():
    raise InputError("no such device")


def first_slow():
    calls = []

    def call():
        calls.append(1)
        time.sleep(0.3 if len(calls) == 1 else 0.001)

    return Subject(call, lambda: len(calls), os.environ["NAMED"])
