"""The text column of Parquet files, row by row."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from parity.errors import InputError, install_extras, printable
from parity.storage.json import LINE

_BATCH_BYTES = 2**26
_BATCH_ROWS = 256


def rows(file: Path, text_field: str) -> Iterator[tuple[str, str]]:
    """Yield the text of each row, and where it is, for messages; null is an empty text.

    Raises:
        InputError: If pyarrow is not installed, the file is damaged, or the column is missing or does not hold text;
            the message names the file, and the column or row.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file} needs a package: {install_extras('parquet')}") from None
    number = 0
    try:
        with parquet.ParquetFile(file) as stored:
            _check_column(file, text_field, stored.schema_arrow, pyarrow.types)
        # A dictionary is not written out: a few bytes of indices could otherwise become any amount of text.
        with parquet.ParquetFile(file, read_dictionary=[text_field]) as stored:
            for batch in stored.iter_batches(_batch_rows(stored.metadata, text_field), columns=[text_field]):
                for value in batch.column(0):
                    number += 1
                    origin = f"{file}, row {number}"
                    yield _as_text(value.as_py(), origin), origin
    except UnicodeDecodeError as error:
        raise InputError(f"{file}, row {number}: not UTF-8 text ({error.reason})") from None
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(f"{file} cannot be read as Parquet ({error})") from None


def _as_text(value: str | bytes | None, origin: str) -> str:
    if value is None:
        return ""
    if len(value) > LINE:
        raise InputError(f"{origin} is too large: it has more than {LINE:,} bytes; put the document in a .txt file")
    try:
        return value if isinstance(value, str) else value.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{origin}: not UTF-8 text ({error.reason})") from None


def _check_column(file: Path, name: str, schema: Any, types: Any) -> None:
    names = schema.names
    if name not in names:
        shown = printable(", ".join(names), 300)
        raise InputError(f"{file}: no column {name!r}; the columns are {shown}; choose one with --text-field")
    if names.count(name) > 1:
        raise InputError(f"{file}: {names.count(name)} columns are named {name!r}; rename all but one")
    kind = schema.field(name).type
    stored = kind.value_type if types.is_dictionary(kind) else kind
    accepted = ("string", "large_string", "string_view", "binary", "large_binary", "binary_view", "null")
    if not any(getattr(types, f"is_{accepted_kind}", bool)(stored) for accepted_kind in accepted):
        raise InputError(f"{file}: column {name!r} has type {kind!s:.80}, not text; choose one with --text-field")


def _batch_rows(metadata: Any, name: str) -> int:
    """Return a number of rows whose text fits in memory, by the mean length of a row in each row group."""
    count = _BATCH_ROWS
    for index in range(metadata.num_row_groups):
        group = metadata.row_group(index)
        columns = (group.column(number) for number in range(group.num_columns))
        size = sum(column.total_uncompressed_size for column in columns if column.path_in_schema == name)
        count = min(count, _BATCH_BYTES * group.num_rows // max(size, 1))
    return max(count, 1)
