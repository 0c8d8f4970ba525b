"""Files with a prompt per line: plain texts, or JSON objects that may have an id and a seed."""

import codecs
import dataclasses
import hashlib
import operator
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from parity.config import GPTConfig
from parity.data.tokenizer import Tokenizer, encode_prompt
from parity.errors import InputError, printable
from parity.storage.json import LINE, as_object, parse

JSON_SUFFIXES = (".jsonl", ".ndjson")
_FIELDS = ("prompt", "tokens", "id", "seed")


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A prompt of a file."""

    id: int | str
    """Its id, by default the number of its line, counted from 1."""
    tokens: np.ndarray
    """int32 [T], T >= 1"""
    seed: int | None = None
    """Seed of its random numbers, if the line gives one."""


@dataclasses.dataclass(frozen=True)
class BadLine:
    """A line that holds no prompt for the model."""

    id: int
    """The number of the line."""
    reason: str


class _Entry(NamedTuple):
    """What a line says, before it is encoded."""

    id: int | str
    content: str | list[Any]
    seed: int | None


class PromptFile:
    """A file with a prompt per line, checked for what can be seen without encoding the prompts.

    A file named .jsonl or .ndjson has a JSON object per line: {"prompt": text} or {"tokens": ids}, with an "id" (a text
    or an integer, which no other line has) and a "seed" if desired. Each line of any other file is a text. Blank lines
    are skipped.

    Args:
        path: The file.
        skip_bad: Whether bad lines are no error; None if they are and the user cannot change it.

    Raises:
        InputError: For a bad line, whose number the message has, and for a file that cannot be read or has no prompts.
    """

    def __init__(self, path: Path, skip_bad: bool | None = None):
        if not path.is_file():
            raise InputError(f"--prompts {path} is not a file")
        self.path = path
        self._skip_bad = skip_bad
        self._is_json = path.suffix.lower() in JSON_SUFFIXES
        self._starts, self._numbers = array("Q"), array("Q")  # of the lines that are not blank: place, number
        self._bad: dict[int, str] = {}  # {number of the line: reason}
        digest, ids = hashlib.sha256(), set[str]()
        with path.open("rb") as file:
            for number, start, line in _lines(file, path):
                digest.update(line)
                if not line.strip():
                    continue
                self._starts.append(start)
                self._numbers.append(number)
                id: int | str = number
                try:
                    id = _entry(line, number, self._is_json).id
                    if str(id) in ids:
                        raise InputError(f"has the id {printable(str(id), 80)}, which an earlier line has too")
                except InputError as error:
                    self._refuse(number, str(error))
                if self._is_json:
                    ids.add(str(id))
        self.sha256 = digest.hexdigest()
        self.n_prompts = len(self._starts)
        if not self.n_prompts:
            raise InputError(f"--prompts {path} has no line with a prompt")

    def encode(
        self, indices: range, tokenizer: Tokenizer, config: GPTConfig, context_size: int | None = None
    ) -> list[Prompt | BadLine]:
        """Return the prompts with these indices, in which blank lines are not counted.

        Args:
            indices: The indices, from 0 to n_prompts - 1.
            tokenizer: Encodes the texts. An empty text becomes the end-of-text token.
            config: The model's configuration, which limits the ids and the length of the prompts.
            context_size: As in parity.sampling.GenerateOptions; longer prompts are allowed if it is given.

        Raises:
            InputError: For a line that the model cannot read, unless bad lines are skipped.
        """
        prompts: list[Prompt | BadLine] = []
        with self.path.open("rb") as file:
            for index in indices:
                number = self._numbers[index]
                if number not in self._bad:
                    file.seek(self._starts[index])
                    try:
                        entry = _entry(file.readline(LINE), number, self._is_json)
                        prompts.append(_prompt(entry, tokenizer, config, context_size))
                        continue
                    except InputError as error:
                        self._refuse(number, str(error))
                prompts.append(BadLine(number, self._bad[number]))
        return prompts

    def _refuse(self, number: int, reason: str) -> None:
        """Remember that a line is bad, or raise InputError."""
        if not self._skip_bad:
            hint = "" if self._skip_bad is None else "; with --skip-bad the others are generated"
            raise InputError(f"--prompts {self.path}, line {number} {reason}; correct or remove it{hint}")
        self._bad[number] = reason


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield the number of each line, counted from 1, its place in the file, and the line."""
    start = 0
    for number, line in enumerate(iter(lambda: file.readline(LINE + 1), b""), 1):
        if len(line) > LINE:
            raise InputError(f"--prompts {path}, line {number} has more than {LINE:,} bytes")
        yield number, start, line
        start += len(line)


def _entry(line: bytes, number: int, is_json: bool) -> _Entry:
    """Read a line; the messages of the InputErrors go on after the number of the line."""
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    if not is_json:
        try:
            return _Entry(number, line.decode("utf-8").rstrip("\r\n"), None)
        except UnicodeDecodeError:
            raise InputError("is not UTF-8 text") from None
    try:
        entry = as_object(parse(line, "it"), "it")
    except InputError as error:
        raise InputError(f"cannot be read: {error}") from None
    if unknown := sorted(entry.keys() - set(_FIELDS)):
        raise InputError(f"has the unknown field {unknown[0]!r:.60}; the fields are {', '.join(_FIELDS)}")
    if len(entry.keys() & {"prompt", "tokens"}) != 1:
        raise InputError("must have either a prompt (a text) or tokens (a list of ids)")
    id, seed, content = entry.get("id", number), entry.get("seed"), entry.get("prompt", entry.get("tokens"))
    if isinstance(id, bool) or not isinstance(id, int | str):
        raise InputError(f"has the id {id!r:.60}; it must be a text or an integer")
    if seed is not None and (isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**64):
        raise InputError(f"has the seed {seed!r:.60}; it must be an integer in 0..{2**64 - 1}")
    if not isinstance(content, str if "prompt" in entry else list):
        raise InputError("has a prompt that is not a text" if "prompt" in entry else "has tokens that are not a list")
    for text in (id, content):
        if isinstance(text, str) and not _is_unicode(text):
            raise InputError(r"is not Unicode text: it has half of a surrogate pair (\ud800 to \udfff)")
    return _Entry(id, content, seed)


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompt(entry: _Entry, tokenizer: Tokenizer, config: GPTConfig, context_size: int | None) -> Prompt:
    """Encode the text of a line, and check that the model can read it."""
    try:
        if isinstance(entry.content, str):
            ids = list(encode_prompt(tokenizer, entry.content))
        elif any(isinstance(token, bool) for token in entry.content) or not entry.content:
            raise TypeError
        else:
            ids = [operator.index(token) for token in entry.content]
    except TypeError:
        raise InputError("has tokens that are not a list of integers, at least one") from None
    try:
        config.check_tokens((1, min(len(ids), context_size or len(ids))), min(ids), max(ids))
    except InputError as error:
        raise InputError(f"does not fit the model: {error}") from None
    return Prompt(entry.id, np.array(ids, np.int32), entry.seed)
