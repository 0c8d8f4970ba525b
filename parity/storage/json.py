"""JSON that others wrote: every fault of it becomes one InputError that names the file."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, TypeVar

from parity.errors import InputError, printable

T = TypeVar("T")

# Largest sizes in bytes, by kind of file.
SETTINGS = 4 * 2**20
"""Of config.json, hparams.json and other files of settings."""
LISTING = 64 * 2**20
"""Of files with an entry per file or token: manifests, indexes, vocabularies."""
LINE = 64 * 2**20
"""Of one line of JSON lines."""

_DEEPEST = 100
_KINDS: dict[type, str] = {
    str: "text",
    int: "an integer",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}


def read_object(path: Path, limit: int = SETTINGS, origin: str = "", hint: str = "") -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: The file.
        limit: Largest size of the file in bytes.
        origin: What messages call the file; by default its path.
        hint: What to do about a file that cannot be read, for the message.

    Raises:
        InputError: If the file is missing, too large, or holds anything else than one object; see `parse`.
    """
    origin = origin or str(path)
    try:
        if path.exists() and not path.is_file():  # opening a pipe would wait for its writer
            raise InputError(f"{origin} cannot be read (it is not a file){hint and '; ' + hint}")
        size = path.stat().st_size
        data = path.read_bytes() if size <= limit else b""
    except OSError as error:
        raise InputError(f"{origin} cannot be read ({error.strerror}){hint and '; ' + hint}") from None
    if size > limit:
        raise InputError(f"{origin} is too large: it has more than {limit:,} bytes")
    return as_object(parse(data, origin), origin)


def read_lines(file: IO[bytes], path: Path, repair: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what messages call each line of a file of JSON lines, and its object.

    Args:
        file: The file, at its beginning. A last line that is not complete, because the process was killed while it
            wrote it, is left out.
        path: Its path, for messages.
        repair: Whether to remove such a line; the file must then be open for writing.

    Raises:
        InputError: If a line does not hold one object; see `parse`.
    """
    complete = 0
    for number, line in enumerate(iter(lambda: file.readline(LINE), b""), 1):
        if not line.endswith(b"\n"):
            if repair:
                file.truncate(complete)
            return
        complete += len(line)
        origin = f"{path}, line {number}"
        yield origin, as_object(parse(line, origin), origin)


def parse(data: bytes, origin: str, strict: bool = True) -> Any:
    """Parse JSON in UTF-8, UTF-16 or UTF-32.

    Args:
        data: The JSON.
        origin: What messages call it.
        strict: Whether to refuse what parsers disagree about: an object with the same key twice, and numbers that are
            not finite.

    Raises:
        InputError: If it is not valid JSON, is nested more than 100 levels deep, or is refused by `strict`.
    """
    hooks: dict[str, Any] = {}
    if strict:
        hooks = {"object_pairs_hook": _unique, "parse_float": _finite, "parse_constant": _finite}
    try:
        value = json.loads(data, **hooks)
    except RecursionError:
        raise InputError(f"{origin} is nested more than {_DEEPEST} levels deep") from None
    except ValueError as error:
        raise InputError(f"{origin} is not valid JSON ({error})") from None
    _check_depth(value, data, origin)
    return value


def as_object(value: Any, origin: str) -> dict[str, Any]:
    """Return a parsed value that must be a JSON object; raises InputError otherwise."""
    if not isinstance(value, dict):
        raise InputError(f"{origin} must hold a JSON object")
    return value


def get_entry(entries: Mapping[str, Any], key: str, kind: type[T], origin: str) -> T:
    """Return the value of a key; raises InputError if it is missing or of another type than `kind`."""
    value = entries.get(key)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        state = f"is {printable(repr(value), 80)}" if key in entries else "is missing"
        raise InputError(f"{origin}: {key} {state}; it must be {_KINDS[kind]}")
    return value


def changed_settings(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the entries in which two settings differ, for a message; empty if they are equal."""
    new = json.loads(json.dumps(dict(new)))
    return "; ".join(
        f"{name} was {old.get(name)!r:.200} and is now {new.get(name)!r:.200}"
        for name in sorted({*old, *new})
        if old.get(name) != new.get(name)
    )


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) < len(pairs):
        names = [key for key, _ in pairs]
        twice = next(key for key in entries if names.count(key) > 1)
        raise ValueError(f"the key {printable(repr(twice), 80)} occurs twice in one object")
    return entries


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{printable(text, 80)} is not a finite number")
    return value


def _check_depth(value: Any, data: bytes, origin: str) -> None:
    """Raise InputError for deep nesting, which would end in a RecursionError wherever the value is used."""
    level = [value] if data.count(b"[") + data.count(b"{") > _DEEPEST else []
    for _ in range(_DEEPEST):
        containers = [item for item in level if isinstance(item, dict | list)]
        level = [child for item in containers for child in (item.values() if isinstance(item, dict) else item)]
        if not level:
            return
    raise InputError(f"{origin} is nested more than {_DEEPEST} levels deep")
