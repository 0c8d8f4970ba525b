"""The one error for everything a user can mend."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: the message names the file or option, and what to do about it."""


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Turn an InputError into one line on standard error and exit status 2 (for scripts)."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
