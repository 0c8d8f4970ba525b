"""JSON that others wrote is read in one place, and every fault of it is one line that names the file."""

import json

import pytest

from parity.data.merges import merges_text
from parity.data.tokenizer_files import own_vocabulary
from parity.errors import InputError
from parity.storage import manifest
from parity.storage.json import SETTINGS, get_entry, parse, read_object
from parity.training.runs import RunFolder
from parity.weights.huggingface import read
from parity.weights.openai import read_hparams

FAULTS = {
    "empty": b"",
    "cut": b'{"a": ',
    "list": b"[1]",
    "null": b"null",
    "no UTF-8": b'{"a": "\xff"}',
    "deep list": b'{"a": ' + b"[" * 100_000,
    "deep object": b'{"a":' * 300 + b"1" + b"}" * 300,
    "same key twice": b'{"n_head": 2, "n_head": 4}',
    "same key twice inside": b'{"a": [{"b": 1, "b": 1}]}',
    "not a number": b'{"a": NaN}',
    "infinite": b'{"a": -Infinity}',
    "overflow": b'{"a": 1e999}',
    "long integer": b'{"a": ' + b"1" * 5000 + b"}",
    "too large": b'{"a": "' + b"x" * SETTINGS + b'"}',
}
READERS = {
    "config.json": lambda folder: RunFolder(folder).config(),
    "hparams.json": lambda folder: read_hparams(folder / "hparams.json"),
    "manifest.json": manifest.read,
    "tokenizer_config.json": own_vocabulary,
    "tokenizer.json": lambda folder: merges_text(folder / "tokenizer.json"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_reader_refuses_in_one_line(tmp_path, fault):
    for name, reader in {**READERS, "model/config.json": lambda folder: read(folder / "model")}.items():
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(FAULTS[fault])
        with pytest.raises(InputError) as caught:
            reader(tmp_path)
        assert file.name in str(caught.value)
        assert len(str(caught.value)) < 500
        file.unlink()


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(InputError, match=r"folder cannot be read .*not a file"):
        read_object(tmp_path / "folder")
    with pytest.raises(InputError, match=r"none\.json cannot be read \(No such file.*; do this"):
        read_object(tmp_path / "none.json", hint="do this")


def test_what_is_read():
    entries = {"a": [1, 2.5, None, {"b": "ä"}], "c": True, "d": 10**400}
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        assert parse(json.dumps(entries, ensure_ascii=False).encode(encoding), "x") == entries
    shallow = "[" * 100 + "]" * 100
    assert parse(shallow.encode(), "x") == json.loads(shallow)
    with pytest.raises(InputError, match="x is nested more than 100 levels deep"):
        parse(f"[{shallow}]".encode(), "x")
    lenient = parse(b'{"a": 1, "a": NaN}', "x", strict=False)
    assert lenient["a"] != lenient["a"]


def test_entries_have_types():
    entries = {"text": "x", "number": 1, "flag": True, "null": None}
    assert (get_entry(entries, "text", str, "f"), get_entry(entries, "flag", bool, "f")) == ("x", True)
    for key, kind, message in [
        ("flag", int, "f: flag is True; it must be an integer"),
        ("number", bool, "f: number is 1; it must be true or false"),
        ("null", dict, "f: null is None; it must be an object"),
        ("missing", list, "f: missing is missing; it must be a list"),
    ]:
        with pytest.raises(InputError, match=message):
            get_entry(entries, key, kind, "f")
