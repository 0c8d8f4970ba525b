"""The console of the scripts, which never interprets a value as markup, and the progress of long tasks."""

import datetime
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

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


_SECONDS_BETWEEN_LINES = 30


class TaskProgress:
    """Shows how much of a task is done, how fast, and how long the rest takes: as a bar, or as lines in a log.

    Args:
        console: Where to print. If it is a terminal, the bar disappears at the end of the context.
        name: What the task is.
        unit: What it consists of, in the plural.
    """

    def __init__(self, console: PlainConsole, name: str, unit: str):
        columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[text]}"))
        self._progress = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._bar = self._progress.add_task(name, total=None, text="")
        self._name, self._unit = name, unit
        self._start = self._printed = time.monotonic()

    def __enter__(self) -> "TaskProgress":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def show(self, done: int, total: int, n_new: int, n_tokens: int) -> None:
        """Show that `done` of `total` units are done, `n_new` of them and `n_tokens` tokens since the start."""
        now = time.monotonic()
        seconds = now - self._start
        left = "?" if n_new == 0 else datetime.timedelta(seconds=round(seconds * (total - done) / n_new))
        text = f"{done:,} of {total:,} {self._unit}, {n_tokens / max(seconds, 1e-9):,.0f} tokens/s, {left} left"
        self._progress.update(self._bar, completed=done, total=total, text=text)
        if self._progress.disable and now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            self._progress.console.print(f"{self._name}: {text}", soft_wrap=True)
