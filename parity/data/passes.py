"""The two passes of a preparation, each over all or some of its pieces of work, and its end."""

import bisect
import contextlib
import dataclasses
import shutil
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from parity.data.assembly import load_shard, make_shard
from parity.data.engines import Engine, ThisProcess
from parity.data.preparation import Preparation, Unit
from parity.data.shard_index import SPLITS, load_index, shard_name, write_finished
from parity.data.splits import find_starts, shard_list
from parity.data.units import read_sources, tokenize_unit
from parity.errors import InputError, printable
from parity.parts import Part

_MOST_NAMED = 8  # parts in a message


@dataclasses.dataclass(frozen=True)
class Progress:
    """How much has been done."""

    documents: int
    tokens: int
    shards: int


OnProgress = Callable[[Progress], None]


def ignore(progress: Progress) -> None:
    """Do nothing about the progress."""


def tokenize_units(
    preparation: Preparation, units: Sequence[Unit], numbers: Iterable[int], engine: Engine, on_progress: OnProgress
) -> Progress:
    """Make the tokens of the units with these numbers, and return their counts."""
    documents = tokens = 0

    def report(more_documents: int, more_tokens: int) -> None:
        on_progress(Progress(documents + more_documents, tokens + more_tokens, 0))

    # Only in this process a function can be called while a unit is in work.
    more = (report,) if isinstance(engine, ThisProcess) else ()
    calls = [(preparation, number, units[number], engine.n_threads, *more) for number in numbers]
    with contextlib.closing(engine.map(tokenize_unit, calls)) as results:
        for result in results:
            documents, tokens = documents + result["documents"], tokens + result["tokens"]
            report(0, 0)
    return Progress(documents, tokens, 0)


def write_shards(
    preparation: Preparation,
    shards: Sequence[tuple[str, int]],
    engine: Engine,
    on_progress: OnProgress,
    counts: Progress = Progress(0, 0, 0),
    on_done: Callable[[str, int], None] = lambda split, number: None,
) -> None:
    """Write shards, given as (split, number).

    Args:
        preparation: A preparation whose first pass is complete.
        shards: The shards.
        engine: Does the work.
        on_progress: Called after each shard.
        counts: What the first pass has counted.
        on_done: Called after each shard, in the order of `shards`.
    """
    calls = [(preparation, *shard) for shard in shards]
    with contextlib.closing(engine.map(make_shard, calls)) as results:
        for count, (shard, _) in enumerate(zip(shards, results, strict=True), 1):
            on_done(*shard)
            on_progress(dataclasses.replace(counts, shards=count))


def delete_used_tokens(preparation: Preparation, starts: dict[str, Any], split: str, number: int) -> None:
    """Delete the tokens that no shard needs any more, after a shard and all that stand before it in shard_list."""
    if split == "train":  # the shards for validation, which contain a little of each unit, come first
        ends = starts["train"][1:]
        begin, end = (preparation.shard_tokens * shards for shards in (number, number + 1))
        for unit in range(bisect.bisect_right(ends, begin) if number else 0, bisect.bisect_right(ends, end)):
            preparation.unit_file(unit, "tokens").unlink(missing_ok=True)


def check_first_pass(preparation: Preparation, units: Sequence[Unit], count: int = 0) -> dict[str, Any]:
    """Return where each unit begins; see `find_starts`.

    Args:
        preparation: The preparation.
        units: All of its units.
        count: Number of parts in which it is prepared; 0 if that is not known.

    Raises:
        InputError: If tokens are missing; it names the parts that make them, and the first file that could not be read.
            If there is no text for training.
    """
    missing = [number for number in range(len(units)) if not preparation.unit_file(number, "json").exists()]
    if missing:
        files = [source["path"] for number in missing for source in units[number]]
        message = (
            f"the first pass of {preparation.out} is not complete: the tokens of {len(files)} of "
            f"{sum(map(len, units))} files are missing; the first is {files[0]}"
        )
        if count:
            message += f"; run the first pass of {_parts_of(missing, len(units), count)}"
        errors = (preparation.unit_file(number, "error") for number in missing)
        error = next((file.read_text(encoding="utf-8") for file in errors if file.exists()), "")
        raise InputError(f"{message}{error and '; ' + error}")
    starts = find_starts(preparation, len(units))
    if not starts["train"][-1]:
        names = printable(", ".join(source["path"] for unit in units for source in unit), 300)
        raise InputError(f"the sources hold no text for training: {names}")
    return starts


def _parts_of(numbers: Sequence[int], n: int, count: int) -> str:
    """Return the options --part of the parts that contain one of the numbers of n pieces of work."""
    parts = (Part(index, count) for index in range(count))
    options = [f"--part {part}" for part in parts if any(number in part.of(n) for number in numbers)]
    return ", ".join(options[:_MOST_NAMED]) + (f" and {len(options) - _MOST_NAMED} more" * (len(options) > _MOST_NAMED))


def finish(preparation: Preparation, units: Sequence[Unit], count: int = 0) -> None:
    """Write index.json and delete everything that is not a shard.

    Args:
        preparation: The preparation.
        units: All of its units.
        count: Number of parts in which it is prepared; 0 if that is not known.

    Raises:
        InputError: If anything is missing; the message names it.
    """
    shards = shard_list(preparation, check_first_pass(preparation, units, count))
    done: dict[str, list[dict[str, Any]]] = {split: [] for split in SPLITS}
    missing = []
    for split, number in shards:
        entry = load_shard(preparation, split, number)
        if entry is None:
            missing.append(shard_name(split, number))
        else:
            done[split].append(entry)
    if missing:
        raise InputError(
            f"the second pass of {preparation.out} is not complete: {len(missing)} of {len(shards)} shards are "
            f"missing; the first is {missing[0]}"
        )
    index = load_index(preparation.out)
    sources = [entry for number in range(len(units)) for entry in read_sources(preparation, number)]
    options = {key: index[key] for key in ("tokenizer", "text_field", "validation_fraction", "shard_tokens")}
    write_finished(preparation.out, {"tokenizer": options.pop("tokenizer"), "sources": sources, **options}, done)
    shutil.rmtree(preparation.work, ignore_errors=True)
