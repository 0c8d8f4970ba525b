"""The console of the scripts: values that it prints are never read as markup."""

import sys
from typing import Any

from rich.console import Console

from parity.streams import LossyStream


class PlainConsole(Console):
    """A console that prints texts as they are: brackets, `:names:` of emoji and numbers have no meaning.

    Args:
        lossy: Whether the program goes on when its output cannot be written. Otherwise BrokenPipeError or another
            OSError is raised.
        stderr: Whether to print to standard error instead of standard output.
        options: Others of rich.console.Console.
    """

    def __init__(self, *, lossy: bool = False, stderr: bool = False, **options: Any):
        file = LossyStream(sys.stderr if stderr else sys.stdout) if lossy else None
        super().__init__(file=file, stderr=stderr, markup=False, emoji=False, highlight=False, **options)  # type: ignore[arg-type]

    def on_broken_pipe(self) -> None:
        """rich would exit with status 1, which check_parity.py has for a difference."""
        raise BrokenPipeError
