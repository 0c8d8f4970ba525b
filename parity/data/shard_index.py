"""index.json of a folder of token shards: what is in it, and how far an unfinished preparation got."""

import dataclasses
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from parity.data.token_files import bin_header
from parity.errors import InputError
from parity.storage.atomic import replace_text
from parity.storage.json import LISTING, get_entry, read_object
from parity.storage.manifest import hash_file

INDEX = "index.json"
SPLITS = ("train", "val")
_UNFINISHED = "{} is not fully prepared; run scripts/prepare_data.py again with the same options"


@dataclasses.dataclass
class SplitProgress:
    """Progress of writing one split."""

    piece: int = 0
    """Index of the piece in which its next shard begins."""
    offset: int = 0
    """Number of tokens of that piece that are in earlier shards."""
    read_sha256: str = ""
    """Hash of all pieces of the sources up to and with that one; empty before the first shard."""
    done: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """{name, tokens, sha256} of each complete shard."""


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}_{number:06d}.bin"


def is_prepared(folder: Path) -> bool:
    """Return whether a preparation has been begun in the folder."""
    return (folder / INDEX).exists() or any(folder.glob("*.bin.part"))


def write_index(
    folder: Path, options: Mapping[str, Any], progress: Mapping[str, SplitProgress], complete: bool
) -> None:
    """Write index.json; while the preparation is unfinished, it names the process."""
    entries: dict[str, Any] = {**options, "complete": complete}
    if not complete:
        entries["process"] = os.getpid()
    entries["splits"] = {split: dataclasses.asdict(progress[split]) for split in SPLITS}
    replace_text(folder / INDEX, json.dumps(entries, indent=1) + "\n")


def load_index(folder: Path) -> dict[str, Any]:
    """Return the checked content of index.json, under today's names of its keys.

    Raises:
        InputError: If it is missing, is not JSON, or an entry has another type or meaning than prepare_shards writes.
    """
    path = folder / INDEX
    hint = "; restore it, or empty the folder and prepare again"
    try:
        index = read_object(path, LISTING)
        if "validation_part" in index:  # the name of the key before version 0.2
            index["validation_fraction"] = index.pop("validation_part")
        get_entry(index, "complete", bool, str(path))
        get_entry(index, "tokenizer", str, str(path))
        splits = get_entry(index, "splits", dict, str(path))
        for split in SPLITS:
            _check_split(get_entry(splits, split, dict, str(path)), split, str(path))
    except InputError as error:
        raise InputError(f"{error}{hint}") from None
    return index


def _check_split(entries: dict[str, Any], split: str, origin: str) -> None:
    for key in ("piece", "offset"):
        if get_entry(entries, key, int, origin) < 0:
            raise InputError(f"{origin}: {key} is negative")
    entries["read_sha256"] = get_entry({"read_sha256": "", **entries}, "read_sha256", str, origin)
    for number, shard in enumerate(get_entry(entries, "done", list, origin)):
        name = shard_name(split, number)
        if not isinstance(shard, dict) or shard.get("name") != name:
            raise InputError(f"{origin}: entry {number} of {split} is not that of {name}")
        if get_entry(shard, "tokens", int, f"{origin}, {name}") < 1:
            raise InputError(f"{origin}: {name} has no tokens")
        if not re.fullmatch("[0-9a-f]{64}", get_entry(shard, "sha256", str, f"{origin}, {name}")):
            raise InputError(f"{origin}: the sha256 of {name} does not have 64 hexadecimal digits")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of index.json of a prepared folder.

    Raises:
        InputError: If it is missing, damaged or unfinished, or if a shard does not have its size.
    """
    index = load_index(folder) if (folder / INDEX).exists() else {"complete": False}
    if not index["complete"]:
        raise InputError(_UNFINISHED.format(folder))
    for shard in _shards(index):
        path, size = folder / shard["name"], len(bin_header(0)) + 2 * shard["tokens"]
        if not path.is_file() or path.stat().st_size != size:
            raise InputError(f"{path} is missing or does not have {size} bytes; prepare the folder again")
    return index


def verify(folder: Path) -> int:
    """Read all shards of a prepared folder, compare them with the index, and return their number.

    Raises:
        InputError: For a shard whose sha256 differs.
    """
    shards = _shards(read_index(folder))
    for shard in shards:
        if hash_file(folder / shard["name"]) != shard["sha256"]:
            raise InputError(f"{folder / shard['name']} is damaged (its sha256 differs); prepare the folder again")
    return len(shards)


def _shards(index: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [shard for split in SPLITS for shard in index["splits"][split]["done"]]


def load_progress(folder: Path, options: Mapping[str, Any]) -> tuple[dict[str, SplitProgress], bool]:
    """Return how far an earlier preparation in the folder got, and whether it is complete.

    Raises:
        InputError: If it had other options, or the folder holds token files of another origin.
    """
    if not (folder / INDEX).exists():
        if any(folder.glob("*.bin")) and not is_prepared(folder):
            raise InputError(f"{folder} holds token files that were not prepared here; name an empty folder")
        return {split: SplitProgress() for split in SPLITS}, False
    index = load_index(folder)
    before, now = dict(index), dict(options)
    if not index["complete"]:  # what is in shards already is compared when it is read again; the rest may be repaired
        before["sources"], now["sources"] = _paths(index), _paths(options)
    if different := [key for key in options if before.get(key) != now[key]]:
        raise InputError(f"{folder} was prepared with other {', '.join(different)}; name another folder, or empty it")
    fields = [field.name for field in dataclasses.fields(SplitProgress)]
    progress = {s: SplitProgress(**{name: index["splits"][s][name] for name in fields}) for s in SPLITS}
    if not index["complete"] and any(split.done and not split.read_sha256 for split in progress.values()):
        raise InputError(f"{folder} was begun by an older version of this program; empty it and prepare again")
    return progress, index["complete"]


def _paths(options: Mapping[str, Any]) -> list[Any]:
    sources = options.get("sources")
    return [source.get("path") for source in sources if isinstance(source, dict)] if isinstance(sources, list) else []
