"""Token shards from any amount of text, which is streamed and tokenized in parallel; interrupted runs are resumable.

The output folder contains shards in llm.c's format, named train_000000.bin, val_000000.bin and so on, and index.json
with their token counts and sha256, the tokenizer, and the position in the sources where the next shard of each split
begins. Every document is followed by the end-of-text token.
"""

import dataclasses
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.data import documents
from parity.data.documents import Piece
from parity.data.prefetch import prefetch
from parity.data.token_files import bin_header
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.storage.atomic import replace_text

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
    done: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """{name, tokens, sha256} of each complete shard."""


@dataclasses.dataclass(frozen=True)
class Progress:
    """How much of the sources has been read and written."""

    documents: int
    tokens: int
    characters: int
    shards: int


def prepare_shards(
    sources: Sequence[Path],
    out: Path,
    tokenizer: Tokenizer,
    text_field: str = "text",
    validation_fraction: float = 0.005,
    shard_tokens: int = 100_000_000,
    workers: int = 1,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the shards of all documents of the sources to a folder.

    If the folder holds an unfinished run with the same sources and options, it is resumed; a finished one is left as it
    is. Memory does not grow with the size of the sources.

    Args:
        sources: Text, JSONL and Parquet files, or folders of them.
        out: The folder for the shards.
        tokenizer: Encodes the documents.
        text_field: Field of JSONL and column of Parquet that holds the text.
        validation_fraction: Fraction of the documents that go to validation, chosen by a hash of their index.
        shard_tokens: Number of tokens per shard; the last one of a split may be smaller.
        workers: Number of threads that tokenize.
        on_progress: Called after every piece of a document.

    Returns:
        The content of index.json.

    Raises:
        InputError: For sources that are missing, unreadable or empty, options out of range, or a folder that holds
            token files of another origin or with other options.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    if shard_tokens < 1 or workers < 1:
        raise InputError(f"shard_tokens and workers must be at least 1, got {shard_tokens} and {workers}")
    files = documents.find_files(sources)
    options = {
        "tokenizer": tokenizer.name,
        "sources": [{"path": str(file), "bytes": file.stat().st_size} for file in files],
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
    }
    progress, complete = _load_progress(out, options)
    if complete:
        return read_index(out)
    writers = {split: ShardWriter(out, split, progress[split], shard_tokens) for split in SPLITS}

    def write_index(complete: bool) -> None:
        entries = {**options, "complete": complete, "splits": {s: dataclasses.asdict(progress[s]) for s in SPLITS}}
        replace_text(out / INDEX, json.dumps(entries, indent=1) + "\n")

    def encode(numbered: tuple[int, Piece]) -> tuple[int, Piece, str, np.ndarray]:
        index, piece = numbered
        split = SPLITS[zlib.crc32(piece.document.to_bytes(8, "little")) < validation_fraction * 2**32]
        if index < progress[split].piece:  # already in a shard
            return index, piece, split, np.empty(0, np.uint16)
        end = [tokenizer.eos_id] if piece.ends else []
        return index, piece, split, np.concatenate([tokenizer.encode_array(piece.text), np.array(end, np.uint16)])

    seen = tokens = characters = 0
    try:
        numbered = enumerate(documents.pieces(files, text_field))
        for index, piece, split, ids in prefetch(encode, numbered, depth=4 * workers, workers=workers):
            for _ in writers[split].add(index, ids):
                write_index(complete=False)
            seen, tokens, characters = piece.document + piece.ends, tokens + len(ids), characters + len(piece.text)
            on_progress(Progress(seen, tokens, characters, sum(len(split.done) for split in progress.values())))
        for writer in writers.values():
            writer.publish(piece=0, offset=0)
    finally:
        for writer in writers.values():
            writer.close()
    if not progress["train"].done:
        raise InputError(f"the sources hold no text for training: {', '.join(map(str, sources))}")
    write_index(complete=True)
    return read_index(out)


def is_prepared(folder: Path) -> bool:
    """Return whether prepare_shards has written to the folder, even if it was killed before its first index."""
    return (folder / INDEX).exists() or any(folder.glob("*.bin.part"))


def read_index(folder: Path) -> dict[str, Any]:
    """Return the content of index.json of a prepared folder.

    Raises:
        InputError: If it is missing, damaged or unfinished, or if a shard does not have its size.
    """
    if not (folder / INDEX).exists():
        raise InputError(_UNFINISHED.format(folder))
    try:
        index = _load_index(folder)
        shards = [shard for split in SPLITS for shard in index["splits"][split]["done"]]
        sizes = {shard["name"]: len(bin_header(0)) + 2 * shard["tokens"] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX} cannot be read ({error})") from None
    if not index["complete"]:
        raise InputError(_UNFINISHED.format(folder))
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise InputError(f"{folder / name} is missing or does not have {size} bytes; prepare the folder again")
    return index


def verify(folder: Path) -> int:
    """Read all shards of a prepared folder, compare them with the index, and return their number.

    Raises:
        InputError: For a shard whose sha256 differs.
    """
    index = read_index(folder)
    shards = [shard for split in SPLITS for shard in index["splits"][split]["done"]]
    for shard in shards:
        with (folder / shard["name"]).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise InputError(f"{folder / shard['name']} is damaged (its sha256 differs); prepare the folder again")
    return len(shards)


def _load_index(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / INDEX).read_text())
    if "validation_part" in index:  # the name of the key before version 0.2
        index["validation_fraction"] = index.pop("validation_part")
    return index


def _load_progress(out: Path, options: dict[str, Any]) -> tuple[dict[str, SplitProgress], bool]:
    """Return how far an earlier run in the folder got, and whether it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INDEX).exists():
        if any(out.glob("*.bin")) and not is_prepared(out):
            raise InputError(f"{out} holds token files that were not prepared here; name an empty folder")
        return {split: SplitProgress() for split in SPLITS}, False
    try:
        before = _load_index(out)
        progress = {split: SplitProgress(**before["splits"][split]) for split in SPLITS}
        complete = before["complete"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{out / INDEX} cannot be read ({error}); empty the folder and prepare again") from None
    if different := [key for key, value in options.items() if before.get(key) != value]:
        raise InputError(f"{out} was prepared with other {', '.join(different)}; name another folder, or empty it")
    return progress, complete


class ShardWriter:
    """Writes the shards of one split, one after the other."""

    def __init__(self, out: Path, split: str, progress: SplitProgress, size: int):
        self.out, self.split, self.progress, self.size = out, split, progress, size
        # Where the first shard of this run begins.
        self.first_piece, self.first_offset = progress.piece, progress.offset
        self._open_next()

    def _open_next(self) -> None:
        self.count = 0
        self.part = self.out / f"{self.split}_{len(self.progress.done):06d}.bin.part"
        self.file = self.part.open("wb")
        self.file.write(bin_header(0))

    def add(self, piece: int, ids: np.ndarray) -> Iterator[None]:
        """Write the tokens of a piece, and yield after each shard that they fill."""
        if piece < self.first_piece:
            return
        taken = self.first_offset if piece == self.first_piece else 0
        while self.count + len(ids) - taken >= self.size:
            room = self.size - self.count
            self._write(ids[taken : taken + room])
            taken += room
            self.publish(piece, taken)
            self._open_next()
            yield
        self._write(ids[taken:])

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype("<u2").tobytes())
        self.count += len(ids)

    def publish(self, piece: int, offset: int) -> None:
        """Flush the shard to disk and give it its name; the next one begins at token `offset` of `piece`."""
        self.file.seek(0)
        self.file.write(bin_header(self.count))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not self.count:
            self.part.unlink()
            return
        with self.part.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        name = self.part.name.removesuffix(".part")
        self.part.rename(self.out / name)
        self.progress.done.append({"name": name, "tokens": self.count, "sha256": digest})
        self.progress.piece, self.progress.offset = piece, offset

    def close(self) -> None:
        """Delete the shard that is not complete."""
        self.file.close()
        self.part.unlink(missing_ok=True)
