"""Requests to storage that are repeated after failures which may be temporary."""

import sys
import time
from collections.abc import Callable
from typing import Any, TypeVar

from parity.storage.remote_base import DamagedError, MissingError, RemoteError
from parity.streams import LossyStream

RETRY_SECONDS = (1.0, 2.0, 4.0)
"""How long to wait before a failed request is repeated, at the start of a program, where an option may be wrong."""
LONG_RETRY_SECONDS = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0, 60.0, 60.0, 60.0)
"""The same for work that has begun: its storage may be out of reach for five minutes."""

Result = TypeVar("Result")


def retrying(call: Callable[..., Result], *arguments: Any) -> Result:
    """Return the result of a request, which is repeated after a failure that may be temporary.

    Raises:
        RemoteError: After the last try, or if an object is missing.
    """
    for seconds in RETRY_SECONDS:
        try:
            return call(*arguments)
        except MissingError:
            raise
        except RemoteError:
            time.sleep(seconds)
    return call(*arguments)


def retrying_long(call: Callable[..., Result], *arguments: Any) -> Result:
    """Return the result of a request, which is repeated for five minutes, with a line on standard error for each try.

    Raises:
        RemoteError: After the last try, if an object is missing, or if it is damaged a second time.
    """
    is_damaged = False
    for seconds in LONG_RETRY_SECONDS:
        try:
            return call(*arguments)
        except MissingError:
            raise
        except RemoteError as error:
            if is_damaged:
                raise
            is_damaged = isinstance(error, DamagedError)  # perhaps in transit: a second download shows whether it was
            LossyStream(sys.stderr).write(f"{error}; trying again in {seconds:g} s\n")
            time.sleep(seconds)
    return call(*arguments)
