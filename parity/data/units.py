"""The first pass of a preparation: the tokens of each unit of its sources.

A unit may take hours, if it is one large file, so its state is saved from time to time. Another worker copies what was
saved and goes on from there, after reading again, but not tokenizing, the text up to that place.
"""

import dataclasses
import hashlib
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from parity.data import documents
from parity.data.documents import Piece
from parity.data.prefetch import prefetch
from parity.data.preparation import Preparation, Unit
from parity.data.sources import change_time, current_entry, local_copy
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError, printable
from parity.storage.atomic import named_errors, replace_text

_SAVE_EVERY = 2**26  # tokens
_WRITE_EVERY = 2**18  # tokens
_LEAST_SAVED = 2**20  # tokens; fewer are tokenized again in less than a second
_COPY_BYTES = 2**24


def tokenize_unit(
    preparation: Preparation,
    number: int,
    sources: Unit,
    threads: int = 1,
    on_progress: Callable[[int, int], None] = lambda documents, tokens: None,
) -> dict[str, Any]:
    """Write the tokens of a unit, unless they have been written already.

    Args:
        preparation: The preparation.
        number: Index of the unit.
        sources: Its files.
        threads: Number of threads that tokenize.
        on_progress: Called after every piece with the number of its documents and tokens.

    Returns:
        The counts `documents` and `tokens`.

    Raises:
        InputError: For a source that cannot be read or has changed too late, and for other versions than those of the
            worker that began the preparation.
    """
    preparation.check_worker()
    error_file = preparation.unit_file(number, "error")
    try:
        paths = [source["path"] for source in sources]
        current = {"sources": list(map(current_entry, paths)), "times": list(map(change_time, paths))}
        entries = _load(preparation, number, current)
        if entries is None:
            counts = _tokenize(preparation, number, sources, current, threads, on_progress)
            entries = {**counts, **current}
    except InputError as error:
        replace_text(error_file, str(error), shared=True)
        raise
    error_file.unlink(missing_ok=True)
    return {key: entries[key] for key in ("documents", "tokens")}


def read_sources(preparation: Preparation, number: int) -> list[dict[str, Any]]:
    """Return the entries of index.json for the sources of a complete unit, as they were when they were read."""
    entries = preparation.read(preparation.unit_file(number, "json"))
    if entries is None:
        raise InputError(f"{preparation.unit_file(number, 'json')} is missing; run the first pass again")
    return entries["sources"]


def _pieces(preparation: Preparation, sources: Unit) -> Iterator[Piece]:
    """Yield the pieces of all documents of a unit."""
    cut_anywhere = isinstance(preparation.tokenizer, ByteTokenizer)
    for source in sources:
        with local_copy(source["path"], preparation.work) as path:
            for piece in documents.pieces([path], preparation.text_field, cut_anywhere):
                if str(path) != source["path"]:
                    piece = piece._replace(origin=piece.origin.replace(str(path), source["path"]))
                yield piece


def _load(preparation: Preparation, number: int, current: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the result of a unit; None if it has to be made, because it is missing or a source has changed."""
    entries = preparation.read(preparation.unit_file(number, "json"))
    changed = entries is not None and any(entries[key] != current[key] for key in current)
    if changed and (preparation.work / "starts.json").exists():  # shards may contain it
        names = printable(", ".join(source["path"] for source in current["sources"]), 300)
        raise InputError(
            f"{names} changed after {preparation.out} was prepared from it; restore it, or empty the folder and "
            "prepare again"
        )
    return None if changed else entries


@dataclasses.dataclass
class _State:
    """How far the tokens of a unit have been written."""

    pieces: int = 0
    documents: int = 0
    tokens: int = 0
    begun: int = 0
    """Number of tokens of the document that has not ended."""
    sha256: str = ""
    """Hash of the text of all pieces."""


class _TextChangedError(Exception):
    """The sources begin with another text than what was saved."""


def _tokenize(
    preparation: Preparation,
    number: int,
    sources: Unit,
    current: Mapping[str, Any],
    threads: int,
    on_progress: Callable[[int, int], None],
) -> dict[str, Any]:
    """Write the result of a unit and return its counts."""
    while True:
        saved, stem = _newest_state(preparation, number)
        writer = _Writer(preparation, number, saved, stem)
        try:
            _write_pieces(preparation, sources, writer, threads, on_progress)
            return writer.publish(current)
        except _TextChangedError:  # no shard contains any of it yet
            _delete(preparation, stem)
        finally:
            writer.close()


def _write_pieces(
    preparation: Preparation,
    sources: Unit,
    writer: "_Writer",
    threads: int,
    on_progress: Callable[[int, int], None],
) -> None:
    saved = dataclasses.replace(writer.state)

    def encode(numbered: tuple[int, Piece]) -> tuple[Piece, np.ndarray, bytes]:
        index, piece = numbered
        is_saved = index < saved.pieces
        ids = np.empty(0, np.uint16) if is_saved else documents.encode(piece, preparation.tokenizer)
        return piece, ids, hashlib.sha256(piece.text.encode()).digest()

    count = 0
    numbered = enumerate(_pieces(preparation, sources))
    for piece, ids, digest in prefetch(encode, numbered, depth=4 * threads, workers=threads):
        count += 1
        writer.read.update(digest + bytes([piece.ends]))
        if count > saved.pieces:
            writer.add(ids, piece.ends)
        elif count == saved.pieces and writer.read.hexdigest() != saved.sha256:
            raise _TextChangedError
        on_progress(writer.state.documents, writer.state.tokens)
    if count < saved.pieces:
        raise _TextChangedError


class _Writer:
    """Writes a unit under names of its own, because another worker may be writing the same one.

    Args:
        preparation: The preparation.
        number: Index of the unit.
        saved: The state to begin with.
        stem: Beginning of the names of the files that contain it.
    """

    def __init__(self, preparation: Preparation, number: int, saved: _State, stem: str):
        self.preparation, self.number, self.state = preparation, number, dataclasses.replace(saved)
        self.read = hashlib.sha256()
        """Hash of the text of all pieces."""
        self.stem = f"{number:06d}.{secrets.token_hex(8)}"
        self.n_saved = self.n_written = saved.tokens
        self.ids: list[np.ndarray] = []  # not written yet
        self.lengths: list[int] = []
        self.is_consistent = True
        """Whether no change of the state or the files has been interrupted."""
        self.files = {
            kind: self._begin(kind, preparation.work / f"{stem}.{kind}", size)
            for kind, size in (("tokens", 2 * saved.tokens), ("lengths", 8 * saved.documents))
        }

    def _path(self, kind: str) -> Path:
        return self.preparation.work / f"{self.stem}.{kind}"

    def _begin(self, kind: str, earlier: Path, size: int) -> IO[bytes]:
        """Create a file that begins with the first bytes of an earlier one."""
        file = self._path(kind).open("wb")
        if size:
            with earlier.open("rb") as source, named_errors(self._path(kind)):
                while size and (data := source.read(min(size, _COPY_BYTES))):
                    size -= file.write(data)
        return file

    def add(self, ids: np.ndarray, ends: bool) -> None:
        """Write the tokens of a piece, uint16 [length], which may end its document."""
        self.is_consistent = False
        self.ids.append(ids)
        state = self.state
        state.pieces += 1
        state.tokens += len(ids)
        state.begun += len(ids)
        if ends:
            self.lengths.append(state.begun)
            state.documents += 1
            state.begun = 0
        self.is_consistent = True
        if state.tokens - self.n_written >= _WRITE_EVERY:
            self._write()
        if state.tokens - self.n_saved >= _SAVE_EVERY:
            self._save()

    def _write(self) -> None:
        self.is_consistent = False
        tokens = np.concatenate([*self.ids, np.empty(0, np.uint16)]).astype("<u2")
        for kind, array in (("tokens", tokens), ("lengths", np.array(self.lengths, "<i8"))):
            with named_errors(self._path(kind)):
                self.files[kind].write(array.tobytes())
        self.ids, self.lengths, self.n_written = [], [], self.state.tokens
        self.is_consistent = True

    def _flush(self) -> None:
        self._write()
        for kind, file in self.files.items():
            with named_errors(self._path(kind)):
                file.flush()
                os.fsync(file.fileno())

    def _save(self) -> None:
        self._flush()
        self.state.sha256 = self.read.hexdigest()
        self.preparation.write(self._path("saved"), dataclasses.asdict(self.state))
        self.n_saved = self.state.tokens

    def publish(self, current: Mapping[str, Any]) -> dict[str, int]:
        """Give the files their final names, and return the counts."""
        self._flush()
        path = self.preparation.unit_file(self.number, "json")
        counts = {"documents": self.state.documents, "tokens": self.state.tokens}
        try:
            for kind in self.files:
                self._path(kind).replace(self.preparation.unit_file(self.number, kind))
        except FileNotFoundError:  # another worker was faster and has deleted what it did not need
            if not path.exists():
                raise
            return counts
        self.preparation.write(path, {**counts, **current})
        _delete(self.preparation, f"{self.number:06d}.*")
        return counts

    def close(self) -> None:
        """Save what was written before an error, if it is worth it; otherwise delete it."""
        try:
            if not self.files["tokens"].closed and self._path("tokens").exists():
                if self.is_consistent and self.state.tokens - self.n_saved >= _LEAST_SAVED:
                    self._save()
                if not self.n_saved:
                    _delete(self.preparation, self.stem)
        finally:
            for file in self.files.values():
                file.close()


def _newest_state(preparation: Preparation, number: int) -> tuple[_State, str]:
    """Return the state in which a worker has left a unit, and the beginning of the names of its files."""
    best, stem = _State(), ""
    for path in preparation.work.glob(f"{number:06d}.*.saved"):
        entries = preparation.read(path)
        if entries is not None and entries["tokens"] > best.tokens:
            best = _State(**{field.name: entries[field.name] for field in dataclasses.fields(_State)})
            stem = path.name.removesuffix(".saved")
    return best, stem


def _delete(preparation: Preparation, stem: str) -> None:
    """Delete the files of workers that have not published them."""
    for kind in ("tokens", "lengths", "saved"):
        for path in preparation.work.glob(f"{stem}.{kind}"):
            path.unlink(missing_ok=True)
