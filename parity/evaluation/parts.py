"""Parts of an evaluation, which processes or machines compute by themselves, and the results of all of them."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from parity.errors import InputError
from parity.evaluation.catalog import find
from parity.evaluation.records import ITEMS, RESULTS, line_of, read_records, read_results
from parity.evaluation.run import Record, results_of
from parity.parts import Part
from parity.storage.atomic import replace_text
from parity.storage.json import changed_settings, get_entry

_NAME = re.compile(r"([0-9]{5})-of-([0-9]{5})")


def part_folder(folder: Path, part: Part) -> Path:
    """Return the folder of a part of the evaluation in `folder`."""
    return folder / part.label


def unfinished_results(models: Sequence[tuple[str, str]], is_comparable: bool) -> dict[str, Any]:
    """Return what a part has in place of results_of(), whose arguments these are, until all parts are complete."""
    entries = [{"name": name, "weights_sha256": sha256} for name, sha256 in models]
    return {"models": entries, "is_comparable": is_comparable}


def finish(folder: Path) -> list[dict[str, Any]]:
    """Write the results of an evaluation whose parts are complete, as one process without parts would write them.

    The values of the items are added up in the order of the items, so the results are the same for any number of parts.

    Args:
        folder: The folder of the evaluation, which has the folders of its parts.

    Returns:
        The result of each protocol.

    Raises:
        InputError: If parts are missing, unfinished, damaged, or do not belong together, and if the folder has the
            results of another evaluation.
    """
    parts = _parts(folder)
    settings, results = _read(parts[0], folder)
    for part in parts[1:]:
        others, results_there = _read(part, folder)
        if changed := changed_settings(settings, others):
            raise InputError(
                f"--out {folder}: part {part} was computed with other options than part {parts[0]}: {changed}. Delete "
                f"{part_folder(folder, part)} and compute it again"
            )
        if missing := {entry["protocol"] for entry in results} - {entry["protocol"] for entry in results_there}:
            raise InputError(_unfinished(folder, part, sorted(missing)))
    if missing := settings["protocols"].keys() - {entry["protocol"] for entry in results}:
        raise InputError(_unfinished(folder, parts[0], sorted(missing)))
    if (folder / RESULTS).exists() and (changed := changed_settings(read_results(folder)[0], settings)):
        raise InputError(f"--out {folder} has the results of an evaluation with other options: {changed}")

    records: dict[tuple[str, str], dict[int, Record]] = {}
    for part in parts:
        for key, own in read_records(part_folder(folder, part) / ITEMS).items():
            records.setdefault(key, {}).update(own)
    finished, lines = [], []
    for entry in results:
        protocol = find(entry["protocol"])
        if protocol.version != entry["version"]:
            raise InputError(
                f"--out {folder}: its parts are of version {entry['version']} of {protocol.name}, whose version is now "
                f"{protocol.version}; compute them again"
            )
        models = entry.pop("models")
        is_comparable = entry.pop("is_comparable")
        rows = []
        for label, _ in zip("ab", models, strict=False):
            own = records.get((protocol.name, label), {})
            if lost := sorted(set(range(entry["items"])) ^ own.keys()):
                raise InputError(
                    f"--out {folder}: item {lost[0]} of {protocol.name} is missing, or there are more items than "
                    f"{entry['items']}; delete the folders of its parts and compute them again"
                )
            rows.append([own[index] for index in range(entry["items"])])
            lines += [line_of(protocol.name, label, record) for record in rows[-1]]
        identities = [(model["name"], model["weights_sha256"]) for model in models]
        finished.append({**entry, **results_of(protocol, identities, rows, is_comparable)})
    replace_text(folder / ITEMS, "".join(lines))
    text = json.dumps({"settings": settings, "results": finished}, indent=1, ensure_ascii=False)
    replace_text(folder / RESULTS, text + "\n")
    return finished


def _parts(folder: Path) -> list[Part]:
    """Return all parts; raises InputError unless each has a folder."""
    matches = [_NAME.fullmatch(path.name) for path in folder.iterdir()] if folder.is_dir() else []
    found = {Part(int(match[1]), int(match[2])) for match in matches if match}
    counts = {part.count for part in found}
    if len(counts) != 1:
        state = f"has parts of {' and of '.join(map(str, sorted(counts)))}" if counts else "has no parts"
        raise InputError(f"--out {folder} {state}; --finish needs the parts of one evaluation, from --part 0/n on")
    parts = [Part(index, min(counts)) for index in range(min(counts))]
    if missing := [str(part) for part in parts if part not in found]:
        raise InputError(f"--out {folder}: missing are --part {', '.join(missing[:20])}; compute them first")
    return parts


def _read(part: Part, folder: Path) -> tuple[dict[str, Any], list[Any]]:
    """Return the settings of a part, without those of the part itself, and its results."""
    own = part_folder(folder, part)
    settings, results = read_results(own)
    get_entry(settings, "protocols", dict, str(own / RESULTS))
    return {name: value for name, value in settings.items() if name != "part"}, results


def _unfinished(folder: Path, part: Part, protocols: list[str]) -> str:
    return f"--out {folder}: part {part} is not finished: {', '.join(protocols)}; start it again"
