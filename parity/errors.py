"""The one error for everything a user can mend, and how scripts end."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: the message names the file or option, and what to do about it."""


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """For scripts: an InputError, or a file that the system refuses, is one line and exit status 2; Ctrl-C is 130."""
    try:
        yield
    except InputError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(2)
    except OSError as error:  # a full disk, a folder without permission
        sys.stderr.write(f"error: {error.filename or 'input or output'}: {error.strerror or error}\n")
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted; checkpoints saved before are intact\n")
        sys.exit(130)
