"""Token shards from any amount of text, which is streamed and tokenized in parallel; interrupted runs are resumable.

The output folder contains shards in llm.c's format, named train_000000.bin, val_000000.bin and so on, and index.json
with their token counts and sha256, the tokenizer, and the position in the sources where the next shard of each split
begins. Every document is followed by the end-of-text token.
"""

import contextlib
import dataclasses
import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.data import documents
from parity.data.documents import Piece
from parity.data.prefetch import prefetch
from parity.data.shard_index import INDEX, SPLITS, SplitProgress, load_progress, read_index, shard_name, write_index
from parity.data.token_files import bin_header
from parity.data.tokenizer import ByteTokenizer, Tokenizer
from parity.errors import InputError, printable
from parity.storage.json import LISTING, get_entry, read_object
from parity.storage.locks import LOCK, lock_folder
from parity.storage.manifest import hash_file


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
        sources: Text, JSON and Parquet files, or folders of them.
        out: The folder for the shards.
        tokenizer: Encodes the documents.
        text_field: Field of JSON and column of Parquet that holds the text.
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
    is_new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    with _locked(out):
        progress, complete = load_progress(out, options)
        if not complete:
            try:
                _write_shards(files, out, tokenizer, options, progress, workers, on_progress)
            except BaseException:
                if not any(split.done for split in progress.values()):
                    _discard(out, is_new)
                raise
        return read_index(out)


def _write_shards(
    files: Sequence[Path],
    out: Path,
    tokenizer: Tokenizer,
    options: Mapping[str, Any],
    progress: dict[str, SplitProgress],
    workers: int,
    on_progress: Callable[[Progress], None],
) -> None:
    shard_tokens, validation_fraction = options["shard_tokens"], options["validation_fraction"]
    write_index(out, options, progress, complete=False)
    writers = {split: ShardWriter(out, split, progress[split], shard_tokens, tokenizer.n_vocab) for split in SPLITS}
    # What the shards of an earlier preparation contain must still be what the sources begin with.
    unchecked = {split.piece: split.read_sha256 for split in progress.values() if split.done}

    def encode(numbered: tuple[int, Piece]) -> tuple[int, Piece, str, np.ndarray, bytes]:
        index, piece = numbered
        split = SPLITS[zlib.crc32(piece.document.to_bytes(8, "little")) < validation_fraction * 2**32]
        is_written = index < progress[split].piece
        ids = np.empty(0, np.uint16) if is_written else documents.encode(piece, tokenizer)
        return index, piece, split, ids, hashlib.sha256(piece.text.encode()).digest()

    read = hashlib.sha256()
    seen = tokens = characters = 0
    try:
        numbered = enumerate(documents.pieces(files, options["text_field"], isinstance(tokenizer, ByteTokenizer)))
        for index, piece, split, ids, digest in prefetch(encode, numbered, depth=4 * workers, workers=workers):
            read.update(digest + bytes([piece.ends]))
            if unchecked.pop(index, expected := read.hexdigest()) != expected:
                raise InputError(f"{out} was prepared from another text up to {piece.origin}; empty the folder")
            for _ in writers[split].add(index, ids, read.hexdigest):
                write_index(out, options, progress, complete=False)
            seen, tokens, characters = piece.document + piece.ends, tokens + len(ids), characters + len(piece.text)
            on_progress(Progress(seen, tokens, characters, sum(len(split.done) for split in progress.values())))
        if unchecked:
            raise InputError(f"{out} was prepared from more text than the sources hold now; empty the folder")
        for writer in writers.values():
            writer.publish()
    finally:
        for writer in writers.values():
            writer.close()
    if not progress["train"].done:
        names = printable(", ".join(map(str, files)), 300)
        raise InputError(f"the sources hold no text for training: {names}")
    write_index(out, options, progress, complete=True)


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


def _discard(out: Path, is_new: bool) -> None:
    """Delete what a preparation without any shard has left behind."""
    with contextlib.suppress(OSError):
        (out / INDEX).unlink()
        if is_new:
            (out / LOCK).unlink()
            out.rmdir()


class ShardWriter:
    """Writes the shards of one split, one after the other."""

    def __init__(self, out: Path, split: str, progress: SplitProgress, size: int, n_vocab: int):
        self.out, self.split, self.progress, self.size, self.n_vocab = out, split, progress, size, n_vocab
        # Where the first shard of this run begins.
        self.first_piece, self.first_offset = progress.piece, progress.offset
        self._open_next()

    def _open_next(self) -> None:
        self.count = 0
        self.name = shard_name(self.split, len(self.progress.done))
        self.part = self.out / f"{self.name}.part"
        self.file = self.part.open("wb")
        self.file.write(bin_header(0))

    def add(self, piece: int, ids: np.ndarray, read_sha256: Callable[[], str]) -> Iterator[None]:
        """Write the tokens of a piece, and yield after each shard that they fill.

        Args:
            piece: Index of the piece.
            ids: Its tokens.
            read_sha256: Returns the hash of all pieces up to and including this one.
        """
        if piece < self.first_piece:
            return
        taken = self.first_offset if piece == self.first_piece else 0
        while self.count + len(ids) - taken >= self.size:
            room = self.size - self.count
            self._write(ids[taken : taken + room])
            taken += room
            self.publish(piece, taken, read_sha256())
            self._open_next()
            yield
        self._write(ids[taken:])

    def _write(self, ids: np.ndarray) -> None:
        self.file.write(ids.astype("<u2").tobytes())
        self.count += len(ids)

    def publish(self, piece: int = 0, offset: int = 0, read_sha256: str = "") -> None:
        """Flush the shard to disk and give it its name; the next one begins at token `offset` of `piece`."""
        self.file.seek(0)
        self.file.write(bin_header(self.count, self.n_vocab))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        if not self.count:
            self.part.unlink()
            return
        digest = hash_file(self.part)
        self.part.rename(self.out / self.name)
        self.progress.done.append({"name": self.name, "tokens": self.count, "sha256": digest})
        self.progress.piece, self.progress.offset, self.progress.read_sha256 = piece, offset, read_sha256

    def close(self) -> None:
        """Delete the shard that is not complete."""
        self.file.close()
        self.part.unlink(missing_ok=True)
