"""The one error for everything a user can mend, and how scripts end."""

import contextlib
import sys
from collections.abc import Iterator


class InputError(ValueError):
    """Bad input: the message names the file or option, and what to do about it."""


# Packages that may be absent, and the extra of this project that installs each.
_EXTRAS = dict.fromkeys(("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore"), "jax")
_EXTRAS |= {"torch": "torch", "tensorflow": "tf", "transformers": "test"}


def tell(error: BaseException) -> int:
    """One line on standard error for what a user can mend, and the exit status; raises any other error again.

    An InputError, a file that the system refuses, or a package that an extra installs, is 2; Ctrl-C is 130.
    """
    match error:
        case InputError():
            line, status = f"error: {error}", 2
        case OSError():  # a full disk, a folder without permission
            line, status = f"error: {error.filename or 'input or output'}: {error.strerror or error}", 2
        case ModuleNotFoundError(name=str(name)) if extra := _EXTRAS.get(name.partition(".")[0]):
            line = f"error: {name} is not installed; install the extra {extra}: pip install 'gpt-parity[{extra}]'"
            line, status = f"{line}, or in a clone pip install -e '.[{extra}]'", 2
        case KeyboardInterrupt():
            line, status = "interrupted; checkpoints saved before are intact", 130
        case _:
            raise error
    sys.stderr.write(f"{line}\n")
    return status


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """For scripts: an error that tell() knows is a line and an exit status."""
    try:
        yield
    except (InputError, OSError, ModuleNotFoundError, KeyboardInterrupt) as error:
        sys.exit(tell(error))
