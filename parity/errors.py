"""InputError, which reports everything that a user can correct, and the one-line messages that scripts end with."""

import contextlib
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from parity.streams import LossyStream, discard_unwritten, prepare_standard_streams


class InputError(ValueError):
    """Bad input. The message names the file or option and says what to do.

    A message may contain names and values from files. Whatever they are, the message is short and safe to print; see
    `printable`.
    """

    def __init__(self, message: object = "") -> None:
        super().__init__(printable(str(message), _MOST_CHARACTERS))


_MOST_CHARACTERS = 2000  # of a message


def printable(text: str, most: int) -> str:
    """Return a text with its control characters escaped, and without its middle if it exceeds `most` characters."""
    if len(text) > most:
        text = f"{text[: most // 2]} ... {text[-most // 2 :]}"
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raise InputError unless an argument has one of its possible values; the message lists them."""
    if value not in choices:
        raise InputError(f"{name} must be one of {', '.join(choices)}, got {value!r:.60}")


def pip_install(arguments: str) -> str:
    """Return a command that installs packages into the environment of this program, whichever the shell has active."""
    return f"{shlex.quote(_short(Path(sys.executable)))} -m pip install {arguments}"


def install_extras(names: str) -> str:
    """Return a command that installs extras of this project: in a clone, with the tested versions of their packages."""
    root = Path(__file__).parents[1]
    constraints = root / "constraints.txt"
    if not constraints.is_file():
        return pip_install(f"'gpt-parity[{names}]'")
    return pip_install(f"-c {shlex.quote(_short(constraints))} -e {shlex.quote(f'{_short(root)}[{names}]')}")


def _short(path: Path) -> str:
    """A path, relative to the current folder if it is in it."""
    with contextlib.suppress(OSError, ValueError):
        return str(path.relative_to(Path.cwd()))
    return str(path)


_SIGPIPE = 13  # the signal that ends other programs when the reader of their output is gone; not on Windows
# Packages that may be absent, and the extra of this project that installs each.
_EXTRAS = dict.fromkeys(("jax", "jaxlib", "flax", "optax", "orbax", "tensorstore"), "jax")
_EXTRAS |= {"torch": "torch", "tensorflow": "tf", "transformers": "test", "lm_eval": "eval", "yaml": "eval"}
_EXTRAS |= dict.fromkeys(("starlette", "uvicorn"), "serve") | {"ray": "ray"}
_EXTRAS |= {"s3fs": "s3", "gcsfs": "gcs"}


def report_error(error: BaseException) -> int:
    """Print one line on standard error about an error that a user can correct.

    Returns:
        The exit status: 2 for an InputError, a failure of the file system, too little memory, or a missing package
        that an extra of this project installs; 130 for Ctrl-C; 141, without a line, if the reader of standard output
        is gone.

    Raises:
        BaseException: The error itself, if it is of any other kind.
    """
    match error:
        case InputError():
            line, status = f"error: {error}", 2
        case BrokenPipeError():  # `| head` has read enough
            line, status = "", 128 + _SIGPIPE
        case OSError():  # a full disk, a folder without permission
            line, status = f"error: {error.filename or 'input or output'}: {error.strerror or error}", 2
        case ModuleNotFoundError(name=str(name)) if extra := _EXTRAS.get(name.partition(".")[0]):
            line, status = f"error: {name} is not installed; install the extra {extra}: {install_extras(extra)}", 2
        case KeyboardInterrupt():
            line, status = "interrupted; everything that was saved before is intact", 130
        case _ if _is_out_of_memory(error):
            reason = (str(error).strip().splitlines() or [""])[0]
            line, status = (
                f"error: there is not enough memory ({reason:.200}); reduce the batch or the model",
                2,
            )
        case _:
            raise error
    if line:
        LossyStream(sys.stderr).write(f"{printable(line, 2 * _MOST_CHARACTERS)}\n")
    return status


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, NumPy, torch or JAX could not allocate memory."""
    text = str(error)
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and (type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text or "RESOURCE_EXHAUSTED" in text)
    )


@contextlib.contextmanager
def exit_with_message() -> Iterator[None]:
    """Context of the scripts: if `report_error` prints an error, the program exits with the status that it returns."""
    prepare_standard_streams()
    try:
        try:
            yield
        except SystemExit:  # the end of most programs, and of --help
            sys.stdout.flush()
            raise
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        status = report_error(error)
        discard_unwritten(sys.stdout)
        sys.exit(status)
