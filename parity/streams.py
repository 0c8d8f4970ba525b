"""The standard streams of the scripts: closed streams, broken pipes, full disks, other encodings and terminals."""

import contextlib
import io
import os
import re
import sys
from typing import Any, TextIO

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # all control characters but tab and line feed


def prepare_standard_streams() -> None:
    """Make standard streams usable however the program was started.

    A closed stream becomes the null device, and characters that the encoding of standard output lacks become "?".
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115 (open until the program ends)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def discard_unwritten(stream: TextIO) -> None:
    """Drop what a stream has buffered but cannot write; otherwise Python tries again, at the latest when it exits."""
    with contextlib.suppress(OSError, ValueError):  # a stream without a file, or a closed one
        descriptor = stream.fileno()
        saved, null = os.dup(descriptor), os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(null, descriptor)
            stream.flush()
        finally:
            os.dup2(saved, descriptor)
            os.close(saved)
            os.close(null)


class LossyStream:
    """A text stream that drops what it cannot write, for programs that must continue when nobody reads their output."""

    def __init__(self, stream: TextIO):
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            self._stream.write(text)
        except (OSError, ValueError):  # a broken pipe, a full disk, a terminal that was closed, a closed stream
            discard_unwritten(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            discard_unwritten(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def for_display(text: str, stream: TextIO) -> str:
    """Return an untrusted text, with its control characters escaped if `stream` is a terminal."""
    if not stream.isatty():
        return text
    return _CONTROL.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
