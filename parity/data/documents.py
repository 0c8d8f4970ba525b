"""Documents from text, JSONL and Parquet files, one piece at a time, so that no file has to fit in memory."""

import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from parity.data.tokenizer import END_OF_TEXT
from parity.errors import InputError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
_BLOCK = 2**20  # characters read at once
# After a newline without white space on either side, where GPT-2's tokenizer splits anyway.
_CUT = re.compile(r"(?<=\S)\n(?=\S)")


class Piece(NamedTuple):
    """Part of a document, or all of it."""

    text: str
    ends: bool
    """Whether it is the last piece of its document."""
    document: int
    """Index of the document, from 0."""


def find_files(sources: Sequence[Path]) -> list[Path]:
    """Return the files of the sources, in order: each source is a file, or a folder that is searched recursively.

    Raises:
        InputError: For a source that does not exist, or a folder without any suitable file.
    """
    files: list[Path] = []
    for source in sources:
        if source.is_dir():
            inside = sorted(path for path in source.rglob("*") if path.name.endswith(SUFFIXES) and path.is_file())
            if not inside:
                raise InputError(f"folder {source} holds no file that ends with {', '.join(SUFFIXES)}")
            files += inside
        elif source.is_file():
            files.append(source)
        else:
            raise InputError(f"{source} is neither a file nor a folder")
    return files


def pieces(files: Sequence[Path], text_field: str = "text") -> Iterator[Piece]:
    """Yield the documents of all files in order, skipping empty ones.

    A text file contains one document, or several that END_OF_TEXT separates. Each line of a JSONL file and each row of
    a Parquet file is a document.

    Args:
        files: What find_files returned.
        text_field: Field of JSONL and column of Parquet that holds the text.

    Raises:
        InputError: For content that cannot be read; the message names the file, and the line or field.
    """
    index, unfinished = 0, False
    for file in files:
        for text, ends in _reader(file)(file, text_field):
            if text or unfinished:
                yield Piece(text, ends, index)
                unfinished = not ends
                index += ends


def _reader(file: Path) -> Callable[[Path, str], Iterator[tuple[str, bool]]]:
    if file.name.endswith((".jsonl", ".jsonl.gz")):
        return _jsonl
    return _parquet if file.suffix == ".parquet" else _text


def _text(file: Path, _: str) -> Iterator[tuple[str, bool]]:
    """Read a text in blocks, and split it where that changes no token. A text without newlines must fit in memory."""
    buffer = ""
    try:
        with file.open(encoding="utf-8") as stream:
            while block := stream.read(_BLOCK):
                *ended, buffer = (buffer + block).split(END_OF_TEXT)
                yield from ((text, True) for text in ended)
                if cuts := [match.end() for match in _CUT.finditer(buffer)]:
                    yield buffer[: cuts[-1]], False
                    buffer = buffer[cuts[-1] :]
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 text ({error.reason}); convert it first") from None
    yield buffer, True


def _jsonl(file: Path, text_field: str) -> Iterator[tuple[str, bool]]:
    opened = gzip.open if file.suffix == ".gz" else open
    number = 0
    try:
        with opened(file, "rb") as stream:
            for number, line in enumerate(stream, 1):
                if line.strip():
                    yield _field(json.loads(line), text_field, f"{file}, line {number}"), True
    except ValueError as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}, line {number}: not valid JSON in UTF-8 ({error})") from None
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{file} is truncated or damaged ({error})") from None


def _field(entry: object, name: str, origin: str) -> str:
    if not isinstance(entry, dict) or not isinstance(entry.get(name), str):
        fields = f"fields {sorted(entry)}" if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise InputError(f"{origin}: no text in field {name!r}; the line has {fields}; choose one with --text-field")
    # JSON may contain unpaired surrogates, which are not text.
    return entry[name].encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _parquet(file: Path, text_field: str) -> Iterator[tuple[str, bool]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file} needs a package: pip install 'gpt-parity[parquet]'") from None
    try:
        with parquet.ParquetFile(file) as stored:
            names = stored.schema_arrow.names
            if text_field not in names:
                raise InputError(f"{file}: no column {text_field!r}, it has {names}; choose one with --text-field")
            for batch in stored.iter_batches(256, columns=[text_field]):
                yield from ((text or "", True) for text in batch.column(0).to_pylist())
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as Parquet ({error})") from None
