"""The console of the scripts, which never interprets a value as markup."""

import sys
from typing import Any

from rich.console import Console

from parity.streams import LossyStream


class PlainConsole(Console):
    """A console that prints texts as they are: brackets, `:names:` of emoji and numbers have no special meaning.

    Args:
        lossy: Whether the program continues if its output cannot be written. Otherwise BrokenPipeError or another
            OSError is raised.
        stderr: Whether to print to standard error instead of standard output.
        options: Other arguments of rich.console.Console.
    """

    def __init__(self, *, lossy: bool = False, stderr: bool = False, **options: Any):
        file = LossyStream(sys.stderr if stderr else sys.stdout) if lossy else None
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False, highlight=False, **options)  # type: ignore[arg-type]

    def on_broken_pipe(self) -> None:
        """Raise, where rich would exit with status 1, which means a difference in check_parity.py."""
        raise BrokenPipeError
