"""Token shards from any amount of text, made by any number of processes or machines; interrupted runs are resumable.

The output folder contains shards in llm.c's format, named train_000000.bin, val_000000.bin and so on, and index.json
with their token counts and sha256, the tokenizer and the sources. Every document is followed by the end-of-text token.
The same sources and options give the same bytes however the work is divided; parity/data/preparation.py says how.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from parity.data.engines import Engine, Processes, ThisProcess
from parity.data.passes import (
    OnProgress,
    check_first_pass,
    delete_used_tokens,
    finish,
    ignore,
    tokenize_units,
    write_shards,
)
from parity.data.preparation import Preparation, Unit, begin
from parity.data.shard_index import INDEX, SPLITS, load_index, read_index, write_unfinished
from parity.data.sources import find_sources
from parity.data.splits import find_starts, shard_list
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.parts import Part
from parity.storage.json import LISTING, get_entry, read_object
from parity.storage.locks import LOCK, lock_folder

_PROCESS_BYTES = 2**24  # of sources or shards per process; for less, starting it would not pay


@dataclasses.dataclass(frozen=True)
class Request:
    """What to prepare.

    Args:
        sources: Text, JSON and Parquet files, or folders of them; paths or addresses (s3, gs, hf, https).
        out: The folder for the shards.
        tokenizer: Encodes the documents.
        text_field: Field of JSON and column of Parquet that holds the text.
        validation_fraction: Fraction of the documents that go to validation, chosen by a hash of their index.
        shard_tokens: Number of tokens per shard; the last one of a split may be smaller.

    Raises:
        InputError: For options out of range.
    """

    sources: Sequence[str | Path]
    out: Path
    tokenizer: Tokenizer
    text_field: str = "text"
    validation_fraction: float = 0.005
    shard_tokens: int = 100_000_000

    def __post_init__(self) -> None:
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction must be in [0, 1), got {self.validation_fraction}")
        if not 1 <= self.shard_tokens < 2**31:  # the header of a shard has 32 bits for it
            raise InputError(f"shard_tokens must be at least 1 and less than 2^31, got {self.shard_tokens}")

    def entries(self) -> dict[str, Any]:
        """Find the sources, and return the first entries of index.json."""
        return {
            "tokenizer": self.tokenizer.name,
            "sources": find_sources(self.sources),
            "text_field": self.text_field,
            "validation_fraction": self.validation_fraction,
            "shard_tokens": self.shard_tokens,
        }


def prepare_shards(
    sources: Sequence[str | Path],
    out: Path,
    tokenizer: Tokenizer,
    text_field: str = "text",
    validation_fraction: float = 0.005,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    on_progress: OnProgress = ignore,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Write the shards of all documents of the sources to a folder.

    If the folder holds an unfinished preparation with the same sources and options, it is resumed; a finished one is
    left as it is. Memory does not grow with the size of the sources. Tokens that are not in a shard yet take as much
    room on the disk as the shard will.

    Args:
        sources: Text, JSON and Parquet files, or folders of them; paths or addresses (s3, gs, hf, https).
        out: The folder for the shards.
        tokenizer: Encodes the documents.
        text_field: Field of JSON and column of Parquet that holds the text.
        validation_fraction: Fraction of the documents that go to validation, chosen by a hash of their index.
        shard_tokens: Number of tokens per shard; the last one of a split may be smaller.
        workers: Number of processes that tokenize files and write shards. Small sources are prepared in this process;
            it, and each of several processes if there are fewer files than workers, tokenizes with several threads.
        on_progress: Called after every piece of a document, or, with several processes, after every file; and after
            every shard.
        engine: Does the work in place of this machine's processes.

    Returns:
        The content of index.json.

    Raises:
        InputError: For sources that are missing, unreadable or empty, options out of range, or a folder that holds
            token files of another origin or with other options.
    """
    _check_workers(workers)
    request = Request(sources, out, tokenizer, text_field, validation_fraction, shard_tokens)
    entries, is_new = request.entries(), not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        begun = begin(out, entries, tokenizer)
        if begun is not None:
            preparation, units = begun
            write_unfinished(out, {**load_index(out), "process": os.getpid()})
            with _discarding(preparation, is_new):
                first = engine or _first_engine(units, workers)
                counts = tokenize_units(preparation, units, range(len(units)), first, on_progress)
                starts = check_first_pass(preparation, units)
                shards = shard_list(preparation, starts)
                delete = functools.partial(delete_used_tokens, preparation, starts)
                second = engine or _second_engine(starts, len(shards), len(shards), workers)
                write_shards(preparation, shards, second, on_progress, counts, delete)
                finish(preparation, units)
    return read_index(out)


def prepare_part(request: Request, part: Part, stage: int, workers: int = 1, on_progress: OnProgress = ignore) -> None:
    """Do a part of one pass, while others do the other parts, in any order; nothing, if the preparation is complete.

    Args:
        request: What to prepare; the same for all parts.
        part: The part.
        stage: 1 for the tokens of the part's files, 2 for its shards.
        workers: Number of processes; see `prepare_shards`.
        on_progress: See `prepare_shards`.

    Raises:
        InputError: For what `prepare_shards` refuses; in the second pass, if parts of the first one are missing.
    """
    _check_workers(workers)
    begun = _join(request)
    if begun is None:
        return
    try:
        _make_part(*begun, part, stage, workers, on_progress)
    except (InputError, OSError):
        if not _is_complete(request.out):  # otherwise another process has finished it, and deleted what this one needs
            raise


def _make_part(
    preparation: Preparation, units: list[Unit], part: Part, stage: int, workers: int, on_progress: OnProgress
) -> None:
    if stage == 1:
        numbers = part.of(len(units))
        engine = _first_engine([units[number] for number in numbers], workers)
        tokenize_units(preparation, units, numbers, engine, on_progress)
        if all(preparation.unit_file(number, "json").exists() for number in range(len(units))):
            find_starts(preparation, len(units))  # once, and not in every part of the second pass
    else:
        starts = check_first_pass(preparation, units, part.count)
        shards = shard_list(preparation, starts)
        chosen = [shards[number] for number in part.of(len(shards))]
        write_shards(preparation, chosen, _second_engine(starts, len(chosen), len(shards), workers), on_progress)


def finish_parts(request: Request) -> dict[str, Any]:
    """Check that all parts of both passes are there, and write index.json.

    Args:
        request: What has been prepared.

    Returns:
        The content of index.json.

    Raises:
        InputError: If anything is missing; the message names it.
    """
    begun = _join(request)
    if begun is not None:
        with _locked(request.out):
            finish(*begun)
    return read_index(request.out)


def _join(request: Request) -> tuple[Preparation, list[Unit]] | None:
    entries = request.entries()
    request.out.mkdir(parents=True, exist_ok=True)
    return begin(request.out, entries, request.tokenizer)


def _is_complete(out: Path) -> bool:
    try:
        return load_index(out)["complete"]
    except InputError:
        return False


def _check_workers(workers: int) -> None:
    if workers < 1:
        raise InputError(f"workers must be at least 1, got {workers}")


def _first_engine(units: Sequence[Unit], workers: int) -> Engine:
    """Return an engine that tokenizes some units."""
    return _local_engine(len(units), sum(source["bytes"] for unit in units for source in unit), workers)


def _second_engine(starts: dict[str, Any], count: int, n_shards: int, workers: int) -> Engine:
    """Return an engine that writes `count` of all shards."""
    return _local_engine(count, 2 * sum(starts[split][-1] for split in SPLITS) * count // n_shards, workers)


def _local_engine(count: int, size: int, workers: int) -> Engine:
    """Return an engine for pieces of work of so many bytes: as many processes as pay, which share the workers."""
    processes = min(workers, count, size // _PROCESS_BYTES)
    return Processes(processes, workers // processes) if processes > 1 else ThisProcess(workers)


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[None]:
    """Lock a folder that is being prepared; raises InputError if another process is preparing it."""

    def in_use() -> str:
        try:
            process = f"process {get_entry(read_object(out / INDEX, LISTING), 'process', int, '')}"
        except InputError:
            process = "another process"
        return f"{out} is being prepared by {process}; wait until it ends, or name another folder"

    lock = lock_folder(out, in_use)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


@contextlib.contextmanager
def _discarding(preparation: Preparation, is_new: bool) -> Iterator[None]:
    """Within this context, if an error leaves nothing to resume from, delete the preparation and a new folder."""
    try:
        yield
    except BaseException:
        made = any(_has_content(file) for file in preparation.work.glob("*.tokens"))
        if not made and not any(preparation.work.glob("*_*.json")):  # neither tokens nor shards
            with contextlib.suppress(OSError):
                shutil.rmtree(preparation.work)
                (preparation.out / INDEX).unlink()
                if is_new:
                    (preparation.out / LOCK).unlink()
                    preparation.out.rmdir()
        raise


def _has_content(file: Path) -> bool:
    """Return whether a file is not empty; False if a worker that is still at work has just given it another name."""
    try:
        return file.stat().st_size > 0
    except FileNotFoundError:
        return False
