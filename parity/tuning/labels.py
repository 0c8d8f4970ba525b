"""Texts with labels: the files that hold them, labels balanced by leaving texts out, and a random split."""

import csv
import io
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from parity.data.tokenizer import replace_surrogates
from parity.errors import InputError, printable
from parity.storage.json import LISTING
from parity.tuning.embedded import EMBEDDED, labeled_lists, records_by_rule
from parity.tuning.records import Record, read_records

_RECORDS = (".json", ".jsonl", ".ndjson", ".parquet")
_LINES = (".tsv", ".txt", "")
KINDS = "a .json, .jsonl or .parquet file with the fields text and label, or a .tsv file with lines LABEL<tab>TEXT"
"""The kinds of files with labels, for messages."""


class Labeled(NamedTuple):
    """A text with its label."""

    text: str
    label: str
    """Empty if it is not known."""
    record: Record
    """Where they are from."""


def read_labeled(name: str, needs_label: bool = True) -> list[Labeled]:
    """Read all texts of a file, or those made by rule.

    Args:
        name: "rules", or the path of a file; see KINDS. A file without a suffix, such as SMSSpamCollection, is read
            like .tsv.
        needs_label: Whether a text without a label is an error. Of lines without a tab, the whole line is the text.

    Raises:
        InputError: If a record has no text or no label; the message names the file and the place.
    """
    if name == EMBEDDED:
        return [_labeled(record, True) for record in records_by_rule(labeled_lists())]
    file = Path(name)
    suffix = file.suffix.lower()
    if suffix not in _RECORDS + _LINES:
        raise InputError(f"{file}: this kind of file is not supported; give {KINDS}")
    records = read_records(file) if suffix in _RECORDS else _read_lines(file, needs_label)
    return [_labeled(record, needs_label) for record in records]


def _read_lines(file: Path, needs_label: bool) -> list[Record]:
    """Read lines LABEL<tab>TEXT as readers of CSV do: quotation marks at the start of a text enclose it.

    Such a text may span lines, and the marks that enclose it are not a part of it. Blank lines are skipped.
    """
    try:
        if not file.is_file():
            raise InputError(f"{file} is not a file; give {KINDS}")
        if file.stat().st_size > LISTING:
            raise InputError(f"{file} is too large: it has more than {LISTING:,} bytes; split it")
        text = file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise InputError(f"{file} cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{file} is not UTF-8 (byte {error.start}); convert it") from None
    end = ["", "end"]  # which is not read as a row of its own if a quotation mark before it is not closed
    reader = csv.reader(io.StringIO(text.rstrip("\r\n") + "\n\tend", newline=""), delimiter="\t")
    records, first, row = [], 1, []
    try:
        for row in reader:
            origin, first = f"{file}, line {first}", reader.line_num + 1
            if row == end or not row:
                continue
            if len(row) == 1 and not needs_label:
                row = ["", *row]
            if len(row) != 2:
                raise InputError(f"{origin}: {len(row)} fields where LABEL<tab>TEXT is expected")
            records.append(Record(dict(zip(("label", "text"), row, strict=True)), origin))
    except csv.Error as error:
        raise InputError(f"{file}, line {first}: {error}") from None
    if row != end:
        raise InputError(f"{origin}: a quotation mark opens the text and is not closed; double it or remove it")
    if not records:
        raise InputError(f"{file} holds no records")
    return records


def _labeled(record: Record, needs_label: bool) -> Labeled:
    text: Any = record.fields.get("text")
    label: Any = record.fields.get("label")
    if isinstance(label, bool | int):
        label = str(label).lower()
    if label is None and not needs_label:
        label = ""
    for name, value, required in (("text", text, True), ("label", label, needs_label)):
        if not isinstance(value, str) or (required and not value.strip()):
            state = "is missing" if value is None else "is empty" if isinstance(value, str) else "must be text"
            raise InputError(f"{record.origin}: the field {name!r} {state}; give {KINDS}")
    return Labeled(replace_surrogates(text), replace_surrogates(label).strip(), record)


def labels_of(texts: Sequence[Labeled], name: str) -> tuple[str, ...]:
    """Return the different labels, numbers in their order and all others in alphabetical order.

    Raises:
        InputError: If there are fewer than two.
    """
    labels = {text.label for text in texts}
    if len(labels) < 2:
        raise InputError(
            f"{name}: all {len(texts)} texts have the label {printable(repr(texts[0].label), 60)}; a classifier needs "
            "texts with two labels or more"
        )
    numbers = all(label.removeprefix("-").isdecimal() and label.isascii() for label in labels)
    return tuple(sorted(labels, key=int if numbers else str))


def balanced(texts: Sequence[Labeled], labels: Sequence[str], seed: int) -> list[Labeled]:
    """Return as many texts of each label as there are of the rarest one, drawn at random, label by label.

    With two labels these are the texts of the book (Raschka, "Build a Large Language Model (From Scratch)", chapter 6),
    in its order: `sample(count, random_state=seed)` of pandas draws from NumPy's RandomState as this does.
    """
    counts = Counter(text.label for text in texts)
    rarest = min(counts.values())
    chosen: list[Labeled] = []
    for label in labels:
        own = [text for text in texts if text.label == label]
        chosen += own if len(own) == rarest else _sample(own, rarest, seed)
    return chosen


def split_at_random(
    texts: Sequence[Labeled], seed: int, test: float, validation: float
) -> tuple[list[Labeled], list[Labeled], list[Labeled]]:
    """Split texts into those for training, for tests and for validation, in this order of the results.

    Args:
        texts: The texts, which are shuffled first, as `sample(frac=1, random_state=seed)` of pandas shuffles.
        seed: Seed of the shuffle.
        test: Fraction of the texts for tests, which get what rounding leaves: they are the last ones.
        validation: Fraction of the texts for validation, which follow those for training; the number is rounded down.
    """
    shuffled = _sample(texts, len(texts), seed)
    n_train = int(len(texts) * (1 - test - validation) + 1e-9)
    n_both = n_train + int(len(texts) * validation + 1e-9)
    return shuffled[:n_train], shuffled[n_both:], shuffled[n_train:n_both]


def _sample(texts: Sequence[Labeled], count: int, seed: int) -> list[Labeled]:
    numbers = np.random.RandomState(seed).choice(len(texts), count, replace=False)
    return [texts[number] for number in numbers]
