"""Token shards from any amount of text: streaming, in parallel, and able to go on after an interruption.

A folder gets shards in llm.c's format, train_000000.bin and val_000000.bin onwards, and index.json with
their sha256, counts, the tokenizer and where each shard ends in the sources. Each document is followed by
the end of text.
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


@dataclasses.dataclass
class SplitProgress:
    """Where one split stands."""

    piece: int = 0
    """The piece in which its next shard begins"""
    offset: int = 0
    """Tokens of that piece that belong to earlier shards"""
    done: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """{name, tokens, sha256} of each shard"""


@dataclasses.dataclass(frozen=True)
class Progress:
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
    show: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any]:
    """Write the shards of all documents in `sources` to the folder `out`; what index.json then says.

    Documents are for validation by a hash of their number. A folder that holds an unfinished preparation of
    the same sources with the same options is gone on with. Memory does not grow with the sources. Raises
    InputError for sources that are missing or unreadable, and for a folder of another preparation.
    """
    if not 0 <= validation_fraction < 1:
        raise InputError(f"validation_fraction must be in [0, 1), got {validation_fraction}")
    if shard_tokens < 1 or workers < 1:
        raise InputError(f"shard_tokens and workers must be at least 1, got {shard_tokens} and {workers}")
    files = documents.find(sources)
    made = {
        "tokenizer": tokenizer.name,
        "sources": [{"path": str(file), "bytes": file.stat().st_size} for file in files],
        "text_field": text_field,
        "validation_fraction": validation_fraction,
        "shard_tokens": shard_tokens,
    }
    shards, complete = _begin(out, made)
    if complete:
        return read_index(out)
    open_shards = {split: ShardWriter(out, split, shards[split], shard_tokens) for split in SPLITS}

    def write_index(complete: bool) -> None:
        entries = {**made, "complete": complete, "splits": {s: dataclasses.asdict(shards[s]) for s in SPLITS}}
        replace_text(out / INDEX, json.dumps(entries, indent=1) + "\n")

    def encode(numbered: tuple[int, Piece]) -> tuple[int, Piece, str, np.ndarray]:
        number, piece = numbered
        split = SPLITS[zlib.crc32(piece.document.to_bytes(8, "little")) < validation_fraction * 2**32]
        if number < shards[split].piece:  # in a shard already
            return number, piece, split, np.empty(0, np.uint16)
        end = [tokenizer.eos_id] if piece.ends else []
        return number, piece, split, np.concatenate([tokenizer.encode_array(piece.text), np.array(end, np.uint16)])

    seen = tokens = characters = 0
    try:
        numbered = enumerate(documents.pieces(files, text_field))
        for number, piece, split, ids in prefetch(encode, numbered, depth=4 * workers, workers=workers):
            for _ in open_shards[split].add(number, ids):
                write_index(complete=False)
            seen, tokens, characters = piece.document + piece.ends, tokens + len(ids), characters + len(piece.text)
            show(Progress(seen, tokens, characters, sum(len(s.done) for s in shards.values())))
        for shard in open_shards.values():
            shard.publish(number=0, offset=0)
    finally:
        for shard in open_shards.values():
            shard.close()
    if not shards["train"].done:
        raise InputError(f"the sources hold no text for training: {', '.join(map(str, sources))}")
    write_index(complete=True)
    return read_index(out)


def read_index(folder: Path) -> dict[str, Any]:
    """index.json of a prepared folder; raises InputError where it is missing, damaged or unfinished."""
    try:
        index = _load_index(folder)
        shards = [shard for split in SPLITS for shard in index["splits"][split]["done"]]
        sizes = {shard["name"]: len(bin_header(0)) + 2 * shard["tokens"] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{folder / INDEX} cannot be read ({error})") from None
    if not index["complete"]:
        raise InputError(f"{folder} is not fully prepared; run scripts/prepare_data.py again with the same options")
    for name, size in sizes.items():
        if not (folder / name).is_file() or (folder / name).stat().st_size != size:
            raise InputError(f"{folder / name} is missing or has not the {size} bytes that {INDEX} says; prepare again")
    return index


def verify(folder: Path) -> int:
    """How many shards were read and found to have the sha256 that the index says; raises InputError for others."""
    index = read_index(folder)
    shards = [shard for split in SPLITS for shard in index["splits"][split]["done"]]
    for shard in shards:
        with (folder / shard["name"]).open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != shard["sha256"]:
                raise InputError(f"{folder / shard['name']} was altered (its sha256 differs); prepare the folder again")
    return len(shards)


def _load_index(folder: Path) -> dict[str, Any]:
    index = json.loads((folder / INDEX).read_text())
    if "validation_part" in index:  # the name of the key before version 0.2
        index["validation_fraction"] = index.pop("validation_part")
    return index


def _begin(out: Path, made: dict[str, Any]) -> tuple[dict[str, SplitProgress], bool]:
    """How far a preparation got, and whether it is complete."""
    out.mkdir(parents=True, exist_ok=True)
    if not (out / INDEX).exists():
        if any(out.glob("*.bin")):
            raise InputError(f"{out} holds token files that were not prepared here; name an empty folder")
        return {split: SplitProgress() for split in SPLITS}, False
    try:
        before = _load_index(out)
        shards = {split: SplitProgress(**before["splits"][split]) for split in SPLITS}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{out / INDEX} cannot be read ({error}); empty the folder and prepare again") from None
    if different := [key for key, value in made.items() if before.get(key) != value]:
        raise InputError(f"{out} was prepared with other {', '.join(different)}; name another folder, or empty it")
    return shards, before["complete"]


class ShardWriter:
    """The shard of a split that is being written."""

    def __init__(self, out: Path, split: str, state: SplitProgress, size: int):
        self.out, self.split, self.state, self.size = out, split, state, size
        self.skip = state.offset
        self._begin()

    def _begin(self) -> None:
        self.count = 0
        self.part = self.out / f"{self.split}_{len(self.state.done):06d}.bin.part"
        self.file = self.part.open("wb")
        self.file.write(bin_header(0))

    def add(self, number: int, ids: np.ndarray) -> Iterator[None]:
        """Write a piece's tokens; yields after each shard that they filled."""
        if number < self.state.piece:
            return
        taken = self.skip if number == self.state.piece else 0
        while self.count + len(ids) - taken >= self.size:
            room = self.size - self.count
            self._write(ids[taken : taken + room])
            taken += room
            self.publish(number, taken)
            self._begin()
            yield
        self._write(ids[taken:])

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype("<u2").tobytes())
        self.count += len(ids)

    def publish(self, number: int, offset: int) -> None:
        """Give the shard its name, once all of it is on the disk; the next begins at `offset` of piece `number`."""
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
        self.state.done.append({"name": name, "tokens": self.count, "sha256": digest})
        self.state.piece, self.state.offset = number, offset

    def close(self) -> None:
        self.file.close()
        self.part.unlink(missing_ok=True)
