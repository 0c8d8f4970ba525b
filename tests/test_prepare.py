"""Shards contain the tokens of every document once, for any split into pieces, threads and interruptions."""

import functools
import gzip
import json
import os
import signal
import subprocess
import tracemalloc

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from support.interrupting import interrupted
from support.runs import run_script

from parity.data import documents
from parity.data.corpora import load_corpus
from parity.data.shards import SPLITS, prepare_shards, read_index, verify
from parity.data.token_files import read_bin
from parity.data.tokenizer import END_OF_TEXT, ByteTokenizer, GPT2Tokenizer
from parity.errors import InputError

BYTES = ByteTokenizer()
TEXTS = ["first\n\ndocument", "zweites Dokument: äöü", "", "third  \n \n with white space \n", "4", "fünf"]


def tokens(folder, split):
    shards = read_index(folder)["splits"][split]["done"]
    return np.concatenate([np.empty(0, np.uint16), *(read_bin(folder / shard["name"]) for shard in shards)])


def expected(texts, tokenizer=BYTES):
    return [id for text in texts if text for id in [*tokenizer.encode(text), tokenizer.eos_id]]


def write(folder, kind, texts=TEXTS):
    """The texts in a file of one kind."""
    file = folder / f"data{kind}"
    lines = "".join(json.dumps({"text": text, "id": 0}) + "\n" for text in texts)
    if kind == ".txt":
        file.write_text(END_OF_TEXT.join(texts), encoding="utf-8")
    elif kind == ".jsonl":
        file.write_text(lines, encoding="utf-8")
    elif kind == ".jsonl.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    else:
        pyarrow.parquet.write_table(pyarrow.table({"id": [0] * len(texts), "text": texts}), file)
    return file


@pytest.mark.parametrize("kind", documents.SUFFIXES)
@pytest.mark.parametrize("shard_tokens", [7, 1000])
def test_every_kind_of_file_gives_the_same_tokens(tmp_path, kind, shard_tokens):
    file = write(tmp_path, kind)
    index = prepare_shards([file], tmp_path / "out", BYTES, validation_fraction=0, shard_tokens=shard_tokens, workers=2)
    assert tokens(tmp_path / "out", "train").tolist() == expected(TEXTS)
    shards = index["splits"]["train"]["done"]
    assert {shard["tokens"] for shard in shards[:-1]} <= {shard_tokens}
    assert verify(tmp_path / "out") == len(shards)
    assert not list((tmp_path / "out").glob("*.part"))
    assert prepare_shards([file], tmp_path / "out", BYTES, validation_fraction=0, shard_tokens=shard_tokens) == index


def test_cuts_in_a_long_text_change_no_token(tmp_path, vocab_bpe, monkeypatch):
    """A text that is difficult to split, read in blocks of 50 characters, has the tokens of the complete text."""
    tokenizer = GPT2Tokenizer(vocab_bpe)
    generator = np.random.default_rng(0)
    alphabet = [
        "a",
        "word",
        " the",
        "\n",
        "\n\n",
        " ",
        "  ",
        "\t",
        "'s",
        "1",
        "23",
        ".",
        "é",
        "<|endof",
        "\r\n",
        "x\ny",
    ]
    text = "".join(generator.choice(alphabet, 20_000))
    (tmp_path / "long.txt").write_text(text, encoding="utf-8", newline="")
    monkeypatch.setattr(documents, "_BLOCK", 50)
    pieces = list(documents.pieces([tmp_path / "long.txt"]))
    assert len(pieces) > 500
    text = text.replace("\r\n", "\n")  # as Python reads it
    assert "".join(piece.text for piece in pieces) == text
    prepare_shards([tmp_path / "long.txt"], tmp_path / "out", tokenizer, validation_fraction=0, workers=3)
    assert tokens(tmp_path / "out", "train").tolist() == expected([text], tokenizer)


def test_documents_are_split_by_number(tmp_path):
    texts = [f"document {number}" for number in range(2000)]
    file = write(tmp_path, ".jsonl", texts)
    prepare_shards([file], tmp_path / "a", BYTES, validation_fraction=0.1, shard_tokens=5000)
    train, val = (bytes((tokens(tmp_path / "a", s) % 256).astype(np.uint8)).split(b"\0") for s in SPLITS)
    assert sorted(train[:-1] + val[:-1]) == sorted(text.encode() for text in texts)
    assert 150 < len(val) < 250
    corpus = load_corpus(str(tmp_path / "a"), BYTES)
    assert sum(map(len, corpus.validation)) == len(tokens(tmp_path / "a", "val"))
    with pytest.raises(InputError, match="prepared with the bytes tokenizer"):
        load_corpus(str(tmp_path / "a"), type("Other", (), {"name": "gpt2"})())


class Counting(ByteTokenizer):
    calls = 0

    def encode_array(self, text):
        self.calls += 1
        return super().encode_array(text)


def stop_at(shards, progress):
    if progress.shards >= shards:
        raise KeyboardInterrupt


def test_an_interrupted_preparation_is_resumed(tmp_path):
    """Stop after each possible number of shards, with two splits that fill at different speeds."""
    texts = [f"document {number} " * (number % 7) for number in range(300)]
    file = write(tmp_path, ".jsonl", texts)
    options = {"validation_fraction": 0.2, "shard_tokens": 499}
    want = prepare_shards([file], tmp_path / "whole", BYTES, **options)
    out = tmp_path / "part"
    stops = 0
    while True:
        tokenizer, goal = Counting(), len(list(out.glob("*.bin"))) + 2
        try:
            got = prepare_shards([file], out, tokenizer, **options, on_progress=functools.partial(stop_at, goal))
            break
        except KeyboardInterrupt:
            stops += 1
    assert stops > 5
    assert tokenizer.calls < len(texts) / 2  # what lies in finished shards is not tokenized again
    assert got == want
    for split in SPLITS:
        assert np.array_equal(tokens(out, split), tokens(tmp_path / "whole", split))


@pytest.mark.parametrize(("moment", "finished"), [("ShardWriter.publish:5", 4), ("replace_text:1", 1)])
def test_a_killed_script_is_resumed(tmp_path, moment, finished):
    """The script is killed in the middle of its work, and between its first shard and its first index."""
    texts = [f"document {number} " * 50 for number in range(20_000)]
    file = write(tmp_path, ".jsonl", texts)
    out = tmp_path / "out"
    arguments = (file, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "500000")
    command = interrupted(signal.SIGKILL, f"parity.data.shards:{moment}", "prepare_data.py", *arguments)
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert len(list(out.glob("*.bin"))) == finished
    with pytest.raises(InputError, match="not fully prepared"):
        load_corpus(str(out), BYTES)
    result = run_script("prepare_data.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(name for name in os.listdir(out) if not name.endswith(".bin")) == ["index.json"]
    assert run_script("prepare_data.py", "--verify", out).returncode == 0
    counts = [sum(s["tokens"] for s in read_index(out)["splits"][split]["done"]) for split in SPLITS]
    assert sum(counts) == len(expected(texts))


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """Blocks are small here, so that it hardly matters how many of them are in flight, which depends on the threads."""
    monkeypatch.setattr(documents, "_BLOCK", 2**16)
    file = tmp_path / "text.txt"
    file.write_text("some words in a line\n" * 600_000, encoding="utf-8")
    tracemalloc.start()
    prepare_shards([file], tmp_path / "out", BYTES, validation_fraction=0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < file.stat().st_size / 4


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"line 1: no text in field 'text'; the line has fields \['body'\]"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "x"}\n' * 1000, mtime=0)[:-20], "a.jsonl.gz is truncated or damaged"),
        ("a.parquet", b"PAR1 nothing", "cannot be read as Parquet"),
        ("a.txt", b"abc\xff", "a.txt is not UTF-8"),
        ("a.txt", b"", "no text for training"),
        ("a.bin", b"", "holds no file that ends with"),
    ],
)
def test_bad_sources_are_named(tmp_path, name, content, message):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        prepare_shards([tmp_path / "in"], tmp_path / "out", BYTES)
    assert not list((tmp_path / "out").glob("*.bin*")) if (tmp_path / "out").exists() else True


def test_damage_and_mixed_up_folders_are_refused(tmp_path):
    file = write(tmp_path, ".jsonl")
    out = tmp_path / "out"
    prepare_shards([file], out, BYTES, validation_fraction=0)
    with pytest.raises(InputError, match="prepared with other shard_tokens"):
        prepare_shards([file], out, BYTES, validation_fraction=0, shard_tokens=5)
    [shard] = out.glob("*.bin")
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(InputError, match="is damaged"):
        verify(out)
    shard.write_bytes(data[:-2])
    with pytest.raises(InputError, match=r"train_000000.bin is missing or does not have \d+ bytes"):
        load_corpus(str(out), BYTES)
    (out / "index.json").unlink()
    with pytest.raises(InputError, match="not prepared here"):
        prepare_shards([file], out, BYTES)
    with pytest.raises(InputError, match="neither a file nor a folder"):
        prepare_shards([tmp_path / "none"], tmp_path / "new", BYTES)


def test_unpaired_surrogates_become_replacement_characters(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x \\ud800 y"}\n')
    prepare_shards([tmp_path / "a.jsonl"], tmp_path / "out", BYTES, validation_fraction=0)
    assert BYTES.decode(tokens(tmp_path / "out", "train")[:-1]) == "x \ufffd y"
