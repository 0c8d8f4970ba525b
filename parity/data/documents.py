"""Documents from text, JSON and Parquet files, one piece at a time, so that no file has to fit in memory."""

import gzip
import io
import itertools
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from parity.data import cuts, parquet
from parity.data.cuts import cut, split_blocks, split_documents
from parity.data.tokenizer import Tokenizer, replace_surrogates
from parity.errors import InputError, printable
from parity.storage.json import LINE, LISTING, parse

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz")
SUFFIXES = (".txt", ".txt.gz", *_JSON_LINES, ".json", ".parquet")
"""Ends of the names of the files that are read in folders."""
NOT_SUPPORTED = "this kind of file is not supported; convert it to .txt, .jsonl or .parquet"
# Files of text that is not running text: read as such, its syntax would become part of the corpus.
REFUSED = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".json.gz", ".xml", ".html", ".htm", ".ipynb", ".bin")

_Part = tuple[str, bool, str]
"""Text, whether it ends its document, and where it is."""


class Piece(NamedTuple):
    """Part of a document, or all of it."""

    text: str
    ends: bool
    """Whether it is the last piece of its document."""
    document: int
    """Index of the document, from 0."""
    origin: str
    """The file with the line or row, for messages."""


def find_files(sources: Sequence[Path]) -> list[Path]:
    """Return the files of the sources, in order: each source is a file, or a folder that is searched recursively.

    Raises:
        InputError: For a source that does not exist, a folder without any suitable file, or a file of a kind that is
            not supported.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if ends_with(path.name, SUFFIXES) and path.is_file())
            if not inside:
                raise InputError(f"folder {source} holds no file that ends with {', '.join(SUFFIXES)}")
            files += inside
        elif not source.exists():
            raise InputError(f"{source} is neither a file nor a folder")
        elif ends_with(source.name, REFUSED):
            raise InputError(f"{source}: {NOT_SUPPORTED}")
        else:
            files.append(source)
    return files


def pieces(files: Sequence[Path], text_field: str = "text", cut_anywhere: bool = False) -> Iterator[Piece]:
    """Yield the documents of all files in order, skipping empty ones.

    A text file contains one document, or several that END_OF_TEXT separates. Each line of JSON lines, each item of the
    list in a .json file, and each row of a Parquet file is a document. Long documents are cut into pieces.

    Args:
        files: What find_files returned.
        text_field: Field of JSON and column of Parquet that holds the text; null is an empty text.
        cut_anywhere: Whether documents may be cut between any two characters; see `cut`.

    Raises:
        InputError: For content that cannot be read; the message names the file, and the line, item or row.
    """
    index, unfinished = 0, False
    for file in files:
        for text, ends, origin in _read(file, text_field, cut_anywhere):
            if text or unfinished:
                yield Piece(text, ends, index, origin)
                unfinished = not ends
                index += ends


def encode(piece: Piece, tokenizer: Tokenizer) -> np.ndarray:
    """Return the tokens of a piece, uint16 [length], with the end-of-text token if it ends its document.

    Raises:
        InputError: If the tokenizer refuses the text; the message names the file, and the line, item or row.
    """
    try:
        ids = tokenizer.encode_array(piece.text)
    except ValueError as error:
        raise InputError(f"{piece.origin}: the text cannot be tokenized ({error})") from None
    return np.concatenate([ids, np.array([tokenizer.eos_id] * piece.ends, np.uint16)])


def _read(file: Path, text_field: str, cut_anywhere: bool) -> Iterator[_Part]:
    try:
        if ends_with(file.name, (".parquet",)):
            rows = parquet.rows(file, text_field)
        elif ends_with(file.name, (*_JSON_LINES, ".json")):
            rows = _json(file, text_field)
        else:
            yield from _text(file, text_field, cut_anywhere)
            return
        for text, origin in rows:
            yield from _cut(split_blocks(text), cut_anywhere, origin)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file} is truncated or damaged ({error})") from None


def _cut(blocks: Iterable[tuple[str, bool]], cut_anywhere: bool, origin: str) -> Iterator[_Part]:
    try:
        yield from ((text, ends, origin) for text, ends in cut(blocks, cut_anywhere))
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None


def _text(file: Path, text_field: str, cut_anywhere: bool) -> Iterator[_Part]:
    line = 1
    try:
        with _open(file) as stream, io.TextIOWrapper(stream, "utf-8-sig") as decoded:
            first = decoded.read(cuts.BLOCK)
            _check_beginning(first, text_field)
            blocks = itertools.chain([first], iter(lambda: decoded.read(cuts.BLOCK), ""))
            for text, ends in cut(split_documents(blocks), cut_anywhere):
                yield text, ends, f"{file}, line {line}"
                line += text.count("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}); convert it first") from None
    except InputError as error:
        raise InputError(f"{file}, line {line}: {error}") from None


def _check_beginning(text: str, text_field: str) -> None:
    """Raise InputError for content that would be read as text but is not text."""
    if text.count("\0") > len(text) // 4:
        raise InputError("this is binary, or text in UTF-16; convert it to UTF-8 first")
    line, _, _ = text.lstrip().partition("\n")
    if line.startswith("{") and len(line) < cuts.BLOCK:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            return
        if isinstance(entry, dict) and isinstance(entry.get(text_field), str):
            raise InputError(f"this is JSON with a field {text_field!r}, not running text; name the file .jsonl")


def _json(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield the documents of JSON lines, or of a file with one list, with the line or item of each."""
    with _open(file) as stream:
        if ends_with(file.name, (".json",)):
            beginning = stream.read(2**16).removeprefix(b"\xef\xbb\xbf").lstrip()
            stream.seek(0)
            if beginning.startswith(b"["):
                yield from _json_list(file, stream, text_field)
                return
        number = 0
        while line := stream.readline(LINE + 1):
            number += 1
            origin = f"{file}, line {number}"
            if len(line) > LINE:
                raise InputError(
                    f"{origin} is too large: it has more than {LINE:,} bytes; put the document in a .txt file"
                )
            if line.strip():
                yield _field(parse(line, origin, strict=False), text_field, origin), origin


def _json_list(file: Path, stream: IO[bytes], text_field: str) -> Iterator[tuple[str, str]]:
    data = stream.read(LISTING + 1)
    if len(data) > LISTING:
        raise InputError(
            f"{file} is too large: a list of JSON has to fit in {LISTING:,} bytes; write one object per line (.jsonl)"
        )
    for number, entry in enumerate(parse(data, str(file), strict=False), 1):
        origin = f"{file}, item {number}"
        yield _field(entry, text_field, origin), origin


def _field(entry: Any, name: str, origin: str) -> str:
    if not isinstance(entry, dict):
        raise InputError(f"{origin}: a document must be an object with a field {name!r}, not {type(entry).__name__}")
    text = entry.get(name, entry)
    if text is None:
        return ""
    if not isinstance(text, str):
        fields = printable(str(sorted(entry)), 300)
        raise InputError(f"{origin}: no text in field {name!r}; the fields are {fields}; choose one with --text-field")
    return replace_surrogates(text)  # JSON may contain unpaired ones


def ends_with(name: str, suffixes: tuple[str, ...]) -> bool:
    """Return whether a file is of one of some kinds, by the end of its name."""
    return name.lower().endswith(suffixes)


def _open(file: Path) -> IO[bytes]:
    return gzip.open(file, "rb") if ends_with(file.name, (".gz",)) else file.open("rb")  # type: ignore[return-value]
