"""Records of JSON, JSON lines and Parquet files, and the conversations in them, whichever names their fields have."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from parity.data.tokenizer import replace_surrogates
from parity.errors import InputError, install_extras, printable
from parity.storage.json import LISTING, as_object, parse

T = TypeVar("T")

FORMS = (
    'Alpaca {"instruction", "input", "output"}, Dolly {"instruction", "context", "response"}, '
    'chat {"messages": [{"role", "content"}]} and ShareGPT {"conversations": [{"from", "value"}]}'
)
"""The forms of a record that holds a conversation, for messages."""

# (field of the instruction, of the input, of the response); the input may be missing.
_SINGLE = (("instruction", "input", "output"), ("instruction", "context", "response"))
# (field of the list, field of the speaker, field of the text)
_LISTS = (("messages", "role", "content"), ("conversations", "from", "value"))
_USER, _ASSISTANT, _SYSTEM = ("user", "human", "prompter"), ("assistant", "gpt"), ("system",)


class Record(NamedTuple):
    """One object of a file."""

    fields: Mapping[str, Any]
    origin: str
    """The file with the line, item or row, for messages."""


class Turn(NamedTuple):
    """What the user says, and the model's response to it."""

    instruction: str
    input: str
    response: str


class Conversation(NamedTuple):
    """One or several turns."""

    turns: tuple[Turn, ...]
    system: str
    """Text that precedes the first turn; often empty."""
    origin: str
    """Where it is from, for messages."""


def read_records(file: Path) -> list[Record]:
    """Read all records of a file: a list in .json, one object per line in .jsonl, or the rows of a .parquet file.

    Raises:
        InputError: If the file is missing, of another kind, empty or damaged; the message names the file, and the line,
            item or row.
    """
    name = file.name.lower()
    try:
        if not file.is_file():
            raise InputError(f"{file} is not a file; give a .json, .jsonl or .parquet file")
        if name.endswith(".parquet"):
            records = _parquet(file)
        elif name.endswith((".json", ".jsonl", ".ndjson")):
            size = file.stat().st_size
            if size > LISTING:
                raise InputError(f"{file} is too large: it has more than {LISTING:,} bytes; split it")
            data = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
            records = _json_list(file, data) if data.lstrip()[:1] == b"[" else _json_lines(file, data)
        else:
            raise InputError(f"{file}: this kind of file is not supported; give a .json, .jsonl or .parquet file")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from None
    if not records:
        raise InputError(f"{file} holds no records")
    return records


def _json_list(file: Path, data: bytes) -> list[Record]:
    values = parse(data, str(file), strict=False)
    origins = (f"{file}, item {number}" for number in range(1, len(values) + 1))
    return [Record(as_object(value, origin), origin) for value, origin in zip(values, origins, strict=True)]


def _json_lines(file: Path, data: bytes) -> list[Record]:
    records = []
    for number, line in enumerate(data.splitlines(), 1):
        if line.strip():
            origin = f"{file}, line {number}"
            records.append(Record(as_object(parse(line, origin, strict=False), origin), origin))
    return records


def _parquet(file: Path) -> list[Record]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise InputError(f"{file} needs a package: {install_extras('parquet')}") from None
    try:
        with parquet.ParquetFile(file) as stored:
            rows = [row for batch in stored.iter_batches(256) for row in batch.to_pylist()]
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read as Parquet ({error})") from None
    return [Record(row, f"{file}, row {number}") for number, row in enumerate(rows, 1)]


def text_field(record: Record, name: str, required: bool = True) -> str:
    """Return a text of a record without white space around it; null and a missing optional field are empty.

    Raises:
        InputError: If it is not a text, or is required and is missing or empty.
    """
    value = record.fields.get(name)
    if value is None and (name not in record.fields or not required):
        value = "" if not required else None
    if not isinstance(value, str):
        state = f"must be text, got {printable(repr(value), 60)}" if name in record.fields else "is missing"
        raise InputError(f"{record.origin}: the field {name!r} {state}; the fields are {_names(record.fields)}")
    text = replace_surrogates(value).strip()
    if required and not text:
        raise InputError(f"{record.origin}: the field {name!r} is empty; remove the record or complete it")
    return text


def conversation(record: Record, needs_response: bool = True) -> Conversation:
    """Return the conversation of a record in one of the FORMS.

    Args:
        record: The record.
        needs_response: Whether a record whose last response is missing or empty is an error.

    Raises:
        InputError: If the record has another form, or a text is empty or missing; the message says where.
    """
    for list_name, speaker, content in _LISTS:
        if isinstance(record.fields.get(list_name), list):
            return _from_messages(record, list_name, speaker, content, needs_response)
    for instruction, context, response in _SINGLE:
        if instruction in record.fields and (response in record.fields or not needs_response):
            turn = Turn(
                text_field(record, instruction),
                text_field(record, context, required=False),
                text_field(record, response, required=needs_response),
            )
            return Conversation((turn,), "", record.origin)
    raise InputError(f"{record.origin}: the fields {_names(record.fields)} are none of the known forms: {FORMS}")


def _from_messages(record: Record, list_name: str, speaker: str, content: str, needs_response: bool) -> Conversation:
    """Turns from a list of messages in which user and assistant alternate, after an optional system message."""
    system = ""
    said: list[str] = []
    for number, (role, text) in enumerate(_messages(record, list_name, speaker, content), 1):
        origin = f"{record.origin}, message {number}"
        if role in _SYSTEM and number == 1:
            system = text
        elif role not in (_ASSISTANT if len(said) % 2 else _USER):
            expected = "the assistant" if len(said) % 2 else "the user"
            raise InputError(f"{origin}: it is from {printable(repr(role), 60)}, where {expected} has to speak")
        elif not text:
            raise InputError(f"{origin} is empty; remove the record or complete it")
        else:
            said.append(text)
    if not said or (len(said) % 2 and needs_response):
        raise InputError(f"{record.origin}: the conversation does not end with a message of the assistant")
    said += [""] * (len(said) % 2)
    turns = tuple(Turn(user, "", assistant) for user, assistant in zip(said[::2], said[1::2], strict=True))
    return Conversation(turns, system, record.origin)


def _messages(record: Record, list_name: str, speaker: str, content: str) -> Iterator[tuple[str, str]]:
    for number, message in enumerate(record.fields[list_name], 1):
        entry = Record(as_object(message, f"{record.origin}, message {number}"), f"{record.origin}, message {number}")
        yield text_field(entry, speaker), text_field(entry, content, required=False)


def _names(fields: Mapping[str, Any]) -> str:
    return printable(", ".join(map(repr, sorted(map(str, fields)))), 300)


def split(records: Sequence[T], test: float, validation: float) -> tuple[list[T], list[T], list[T]]:
    """Split records in file order into those for training, for tests and for validation, in this order.

    Args:
        records: The records.
        test: Fraction of the records for tests; the number is rounded down.
        validation: Fraction of the records for validation, which gets what rounding leaves.
    """
    n_train, n_test = int(len(records) * (1 - test - validation) + 1e-9), int(len(records) * test)
    return list(records[:n_train]), list(records[n_train : n_train + n_test]), list(records[n_train + n_test :])
