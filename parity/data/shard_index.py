"""index.json of a folder of token shards: what is in it, and how far an unfinished preparation got."""

import json
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


def shard_name(split: str, number: int) -> str:
    """Return the file name of a shard."""
    return f"{split}_{number:06d}.bin"


def is_prepared(folder: Path) -> bool:
    """Return whether a preparation has been begun in the folder."""
    return (folder / INDEX).exists() or any(folder.glob("*.bin.part"))


def write_unfinished(folder: Path, entries: Mapping[str, Any]) -> None:
    """Write index.json of a preparation that is not finished. Several processes may do so at the same time."""
    replace_text(folder / INDEX, json.dumps({**entries, "complete": False}, indent=1) + "\n", shared=True)


def write_finished(folder: Path, options: Mapping[str, Any], shards: Mapping[str, list[dict[str, Any]]]) -> None:
    """Write index.json of a finished preparation.

    Args:
        folder: The folder with the shards.
        options: The first entries.
        shards: {name, tokens, sha256} of the shards of each split, in order.
    """
    splits = {split: {"done": shards[split]} for split in SPLITS}
    replace_text(folder / INDEX, json.dumps({**options, "complete": True, "splits": splits}, indent=1) + "\n")


def load_index(folder: Path) -> dict[str, Any]:
    """Return the checked content of index.json, under today's names of its keys.

    Raises:
        InputError: If it is missing, is not JSON, was left unfinished by version 0.1, or an entry has another type or
            meaning than this module writes.
    """
    path = folder / INDEX
    hint = "; restore it, or empty the folder and prepare again"
    try:
        index = read_object(path, LISTING)
        if "validation_part" in index:  # the name of the key before version 0.2
            index["validation_fraction"] = index.pop("validation_part")
        complete = get_entry(index, "complete", bool, str(path))
        get_entry(index, "tokenizer", str, str(path))
        if not complete:
            _check_unfinished(index, str(path))
            return index
        splits = get_entry(index, "splits", dict, str(path))
        for split in SPLITS:
            _check_split(get_entry(splits, split, dict, str(path)), split, str(path))
    except InputError as error:
        raise InputError(f"{error}{hint}") from None
    return index


def _check_unfinished(index: dict[str, Any], origin: str) -> None:
    if "units" not in index:
        raise InputError(f"{origin} was begun by an older version of this program")
    sources = get_entry(index, "sources", list, origin)
    if not all(isinstance(source, dict) and isinstance(source.get("path"), str) for source in sources):
        raise InputError(f"{origin}: sources is not a list of objects with a path")
    units = get_entry(index, "units", list, origin)
    if any(type(unit) is not int for unit in units) or units[:1] != [0] or sorted({*units}) != units:
        raise InputError(f"{origin}: units does not increase from 0")
    if units[-1] >= len(sources):
        raise InputError(f"{origin}: units has more entries than there are sources")
    get_entry(index, "versions", dict, origin)


def _check_split(entries: dict[str, Any], split: str, origin: str) -> None:
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


def check_unprepared(folder: Path) -> None:
    """Raise InputError if a folder without index.json holds token files of another origin."""
    if any(folder.glob("*.bin")) and not is_prepared(folder):
        raise InputError(f"{folder} holds token files that were not prepared here; name an empty folder")


def compare_options(folder: Path, index: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Raise InputError if a preparation in the folder was begun with other options.

    Args:
        folder: The folder.
        index: What load_index returns.
        options: The first entries of index.json for the options of now.
    """
    before, now = dict(index), dict(options)
    if not index["complete"]:  # a source may be repaired as long as its tokens have not been made
        before["sources"], now["sources"] = ([source["path"] for source in all["sources"]] for all in (before, now))
    if different := [key for key in options if before.get(key) != now[key]]:
        raise InputError(f"{folder} was prepared with other {', '.join(different)}; name another folder, or empty it")
