"""The fields of a request's body, checked by name and type."""

from collections.abc import Mapping
from typing import Any

from parity.errors import InputError
from parity.storage.json import as_object, parse

_KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "an integer": (int,),
    "a number": (int, float),
    "a list of integers": (list,),
    "a list of texts": (list,),
    "a list of objects": (list,),
}
_ITEMS: dict[str, type] = {"a list of integers": int, "a list of texts": str, "a list of objects": dict}
MOST_ITEMS = 2**16


def read_fields(body: bytes, required: Mapping[str, str], optional: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of a JSON object; a field that is null counts as not given.

    Args:
        body: The JSON.
        required: {field: kind}, where a kind is a key of _KINDS.
        optional: {field: kind} of those that may be left out.

    Raises:
        InputError: If it is not a JSON object, or has a field that is unknown or of another kind, or lacks one.
    """
    entries = as_object(parse(body, "the body"), "the body")
    fields = {name: value for name, value in entries.items() if value is not None}
    kinds = {**required, **optional}
    if unknown := sorted(fields.keys() - kinds.keys()):
        raise InputError(f"unknown field {', '.join(unknown):.200}; the fields are {', '.join(sorted(kinds))}")
    if missing := sorted(required.keys() - fields.keys()):
        raise InputError(f"missing: {', '.join(missing)}")
    for name, value in fields.items():
        if not _is(value, kinds[name]):
            raise InputError(f"{name} must be {kinds[name]}, got {value!r:.60}")
    return fields


def _is(value: Any, kind: str) -> bool:
    if not isinstance(value, _KINDS[kind]) or isinstance(value, bool):
        return False
    if not isinstance(value, list):
        return True
    return len(value) <= MOST_ITEMS and all(isinstance(x, _ITEMS[kind]) and not isinstance(x, bool) for x in value)
