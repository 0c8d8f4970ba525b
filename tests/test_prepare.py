"""Shards contain the tokens of every document once, for any split into pieces, threads and interruptions."""

import functools
import gzip
import itertools
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

from parity.data import cuts, documents, parquet, units
from parity.data.corpora import load_corpus
from parity.data.shard_index import SPLITS, read_index, verify
from parity.data.shards import prepare_shards
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
    if kind == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table({"id": [0] * len(texts), "text": texts}), file)
        return file
    entries = [{"text": text, "id": 0} for text in texts]
    if kind.startswith(".txt"):
        content = END_OF_TEXT.join(texts)
    elif kind == ".json":
        content = json.dumps(entries, indent=1)
    else:
        content = "".join(json.dumps(entry) + "\n" for entry in entries)
    file.write_bytes(gzip.compress(content.encode()) if kind.endswith(".gz") else content.encode())
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
    monkeypatch.setattr(cuts, "BLOCK", 50)
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


def stop_after(count):
    """Return a function for on_progress that interrupts the preparation at its call number `count`."""
    calls = itertools.count(1)

    def stop(progress):
        if next(calls) == count:
            raise KeyboardInterrupt

    return stop


def test_an_interrupted_preparation_is_resumed(tmp_path, monkeypatch):
    """Stop again and again, in both passes; nothing is tokenized twice but what was in flight."""
    monkeypatch.setattr(units, "_LEAST_SAVED", 1)
    texts = [f"document {number} " * (number % 7) for number in range(300)]
    file, out = write(tmp_path, ".jsonl", texts), tmp_path / "part"
    options = {"validation_fraction": 0.2, "shard_tokens": 499}
    want = prepare_shards([file], tmp_path / "whole", BYTES, **options)
    stops, calls = {"first": 0, "second": 0}, 0
    while True:
        tokenizer, goal = Counting(), len(list(out.glob("*.bin"))) + 2
        pieces = itertools.count(1)

        def stop(progress, goal=goal, pieces=pieces):
            if progress.shards == goal or (not progress.shards and next(pieces) == 10 * (stops["first"] + 1)):
                raise KeyboardInterrupt

        try:
            got = prepare_shards([file], out, tokenizer, **options, on_progress=stop)
            break
        except KeyboardInterrupt:
            stops["second" if (out / "work" / "starts.json").exists() else "first"] += 1
        calls += tokenizer.calls
    assert stops["first"] > 20
    assert stops["second"] > 5
    assert calls < len(texts) + 6 * stops["first"]  # four pieces may be in flight
    assert got == want
    for shard in (tmp_path / "whole").glob("*.bin"):
        assert (out / shard.name).read_bytes() == shard.read_bytes()
    assert not (out / "work").exists()


MOMENTS = {
    "before a unit is marked as complete": ("preparation:Preparation.write:1", 0),
    "between the passes": ("preparation:Preparation.write:2", 0),
    "before the first shard is marked as complete": ("preparation:Preparation.write:3", 1),
    "before the fifth shard": ("assembly:load_shard:5", 4),
    "before the index": ("passes:write_finished:1", 24),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_script_is_resumed(tmp_path, moment):
    texts = [f"document {number} " * 500 for number in range(2000)]
    file = write(tmp_path, ".jsonl", texts)
    out, (place, finished) = tmp_path / "out", MOMENTS[moment]
    arguments = (file, "--out", out, "--tokenizer", "bytes", "--shard-tokens", "600000")
    command = interrupted(signal.SIGKILL, f"parity.data.{place}", "prepare_data.py", *arguments)
    assert subprocess.run(command, timeout=300).returncode == -signal.SIGKILL
    assert len(list(out.glob("*.bin"))) == finished
    with pytest.raises(InputError, match="not fully prepared"):
        load_corpus(str(out), BYTES)
    result = run_script("prepare_data.py", *arguments)
    assert result.returncode == 0, result.stderr
    assert sorted(name for name in os.listdir(out) if not name.endswith(".bin")) == [".lock", "index.json"]
    assert run_script("prepare_data.py", "--verify", out).returncode == 0
    counts = [sum(s["tokens"] for s in read_index(out)["splits"][split]["done"]) for split in SPLITS]
    assert sum(counts) == len(expected(texts))


def test_memory_does_not_grow_with_the_text(tmp_path, monkeypatch):
    """Blocks are small here, so that the memory for one of them hardly counts."""
    monkeypatch.setattr(cuts, "BLOCK", 2**16)

    def peak(lines):
        file = tmp_path / f"{lines}.txt"
        file.write_text("some words in a line\n" * lines, encoding="utf-8")
        tracemalloc.start()
        prepare_shards([file], tmp_path / f"out_{lines}", BYTES, validation_fraction=0)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return peak, file.stat().st_size

    (few, few_bytes), (many, many_bytes) = peak(300_000), peak(1_200_000)
    assert many - few < (many_bytes - few_bytes) / 20


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "a.jsonl, line 2 is not valid JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r"line 1: no text in field 'text'; the fields are \['body'\]"),
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


def test_null_and_binary_texts_are_alike_in_every_kind_of_file(tmp_path):
    texts = ["a", None, "", "b"]
    files = [tmp_path / name for name in ("a.jsonl", "b.json", "c.parquet")]
    files[0].write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    files[1].write_text(json.dumps([{"text": text} for text in texts]))
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), files[2])
    kinds = {name: getattr(pyarrow, name)() for name in ("binary", "large_binary", "large_string", "string_view")}
    for name, kind in {**kinds, "dictionary": pyarrow.dictionary(pyarrow.int8(), pyarrow.string())}.items():
        files.append(tmp_path / f"{name}.parquet")
        column = pyarrow.array(texts, pyarrow.string()).cast(kind)
        pyarrow.parquet.write_table(pyarrow.table({"text": column}), files[-1])
    for file in files:
        assert [piece.text for piece in documents.pieces([file])] == ["a", "b"], file.name


@pytest.mark.parametrize(
    ("column", "message"),
    [
        (pyarrow.array([1, 2]), "column 'text' has type int64"),
        (pyarrow.array([1.5]), "column 'text' has type double"),
        (pyarrow.array([True]), "column 'text' has type bool"),
        (pyarrow.array([["a"], ["b"]]), "column 'text' has type list<"),
        (pyarrow.array([{"a": "x"}]), "column 'text' has type struct<"),
        (pyarrow.array([1], pyarrow.date32()), "column 'text' has type date32"),
        (pyarrow.array([b"a", b"\xff"]), "row 2: not UTF-8 text"),
    ],
)
def test_columns_without_text_are_named(tmp_path, column, message):
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match=message):
        list(documents.pieces([tmp_path / "a.parquet"]))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"[" * 100_000, r"a\.jsonl, line 1 is nested more than 100 levels deep"),
        ("a.jsonl", b'{"text": "x", "other": ' + b"[" * 200 + b"]" * 200 + b"}", "line 1 is nested more than 100"),
        ("a.ndjson", b'{"text": "x"}\nnull', r"a\.ndjson, line 2: a document must be an object"),
        ("a.json", b'[{"text": "x"}, ["y"]]', r"a\.json, item 2: a document must be an object"),
        ("a.json", b'{\n  "text": "x"\n}', r"a\.json, line 1 is not valid JSON"),
        ("a.jsonl.gz", b"{}", "truncated or damaged"),
        ("a.csv", b"text\nx\n", "this kind of file is not supported; convert it"),
        ("a.TSV", b"text\nx\n", "this kind of file is not supported"),
        ("a.txt", b'{"text": "x"}\n{"text": "y"}\n', r"a\.txt, line 1: this is JSON with a field 'text'"),
        ("a.txt", "text".encode("utf-16-le"), r"a\.txt, line 1: this is binary, or text in UTF-16"),
        ("a.txt", b"words " * 5000 + b"\xe9", r"a\.txt is not UTF-8"),
    ],
)
def test_sources_that_are_not_what_their_names_say(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    for read in (
        lambda: prepare_shards([tmp_path / name], tmp_path / "out", BYTES),
        lambda: load_corpus(str(tmp_path / name), BYTES),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read()
        assert len(str(caught.value)) < 600
    assert not (tmp_path / "out").exists()


def test_lines_and_cells_have_a_largest_size(tmp_path, monkeypatch):
    """However little they take on the disk: a line of a gz file, and a cell that a dictionary repeats."""
    monkeypatch.setattr(documents, "LINE", 1000)
    monkeypatch.setattr(documents, "LISTING", 1000)
    monkeypatch.setattr(parquet, "LINE", 1000)
    texts = ["short", "x" * 2000, "y"]
    for kind, message in [
        (".jsonl", "line 2 is too large"),
        (".ndjson.gz", "line 2 is too large"),
        (".json", r"data\.json is too large"),
        (".parquet", "row 2 is too large"),
    ]:
        with pytest.raises(InputError, match=message):
            list(documents.pieces([write(tmp_path, kind, texts)]))
    size = 10**5
    file = write(tmp_path, ".parquet", ["z" * size] * 300)
    assert file.stat().st_size < size / 2
    monkeypatch.setattr(parquet, "LINE", size)
    tracemalloc.start()
    assert sum(len(piece.text) for piece in documents.pieces([file])) == 300 * size
    assert tracemalloc.get_traced_memory()[1] < 20 * size
    tracemalloc.stop()


def test_a_repaired_line_does_not_cost_the_tokens_before_it(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "_LEAST_SAVED", 1)
    texts = [f"document {number}" for number in range(200)]
    file, out = write(tmp_path, ".jsonl", texts), tmp_path / "out"
    options = {"validation_fraction": 0.1, "shard_tokens": 300}
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join([*lines[:150], '{"text": 5}\n', *lines[150:]]))
    with pytest.raises(InputError, match="line 151: no text"):
        prepare_shards([file], out, BYTES, **options)
    file.write_text("".join(lines))
    want = prepare_shards([file], tmp_path / "whole", BYTES, **options)
    tokenizer = Counting()
    assert prepare_shards([file], out, tokenizer, **options) == want
    assert tokenizer.calls <= 55  # 50, and a few that were in flight


def test_long_files_are_saved_from_time_to_time(tmp_path, monkeypatch):
    """What was saved is used even if the process had no time to save the rest."""
    monkeypatch.setattr(units, "_SAVE_EVERY", 500)
    texts = [f"document {number}" for number in range(200)]
    file, out = write(tmp_path, ".jsonl", texts), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        prepare_shards([file], out, BYTES, validation_fraction=0, on_progress=stop_after(150))
    [saved] = (out / "work").glob("000000.*.saved")
    assert 1500 < json.loads(saved.read_text())["tokens"] < 2000
    tokenizer = Counting()
    prepare_shards([file], out, tokenizer, validation_fraction=0)
    assert tokenizer.calls < 100
    assert tokens(out, "train").tolist() == expected(texts)


CHANGES = {
    "another text": lambda texts: [texts[0].upper(), *texts[1:]],
    "less text": lambda texts: texts[:20],
    "other documents": lambda texts: [texts[0] + texts[1], *texts[2:]],
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_source_is_never_mixed_with_its_earlier_text(tmp_path, monkeypatch, change):
    """Before its tokens are in shards they are made again; afterwards the change is refused."""
    monkeypatch.setattr(units, "_LEAST_SAVED", 1)
    texts = [f"document {number}" for number in range(200)]
    changed = CHANGES[change](texts)
    options = {"validation_fraction": 0.1, "shard_tokens": 300}
    for name, calls in (("part of a unit", 100), ("a shard", 203)):
        out, file = tmp_path / name, write(tmp_path, ".jsonl", texts)
        with pytest.raises(KeyboardInterrupt):
            prepare_shards([file], out, BYTES, **options, on_progress=stop_after(calls))
        assert any((out / "work").glob("*.saved")) == (name == "part of a unit")
        assert len(list(out.glob("*.bin"))) == (name == "a shard") * 2
        write(tmp_path, ".jsonl", changed)
        os.utime(file, ns=(0, 0))  # the time of a change may be too coarse to notice so quick a change
        if name == "a shard":
            with pytest.raises(InputError, match=r"data\.jsonl changed after .* was prepared from it"):
                prepare_shards([file], out, BYTES, **options)
        else:
            want = prepare_shards([file], tmp_path / "whole", BYTES, **options)
            assert prepare_shards([file], out, BYTES, **options) == want


def test_a_unit_whose_source_has_changed_is_made_again(tmp_path):
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    files[0].write_text("first")
    files[1].write_bytes(b"abc\xff")
    with pytest.raises(InputError, match=r"b\.txt is not UTF-8"):
        prepare_shards(files, tmp_path / "out", BYTES, validation_fraction=0)
    files[0].write_text("changed")
    files[1].write_text("repaired")
    index = prepare_shards(files, tmp_path / "out", BYTES, validation_fraction=0)
    assert tokens(tmp_path / "out", "train").tolist() == expected(["changed", "repaired"])
    assert [source["bytes"] for source in index["sources"]] == [7, 8]


def test_a_preparation_of_an_older_version_is_refused(tmp_path):
    file, out = write(tmp_path, ".jsonl"), tmp_path / "out"
    out.mkdir()
    entries = {"complete": False, "tokenizer": "bytes", "process": 1}
    (out / "index.json").write_text(json.dumps({**entries, "splits": {}}))
    with pytest.raises(InputError, match=r"was begun by an older version of this program; .*empty the folder"):
        prepare_shards([file], out, BYTES)


def test_a_folder_is_prepared_by_one_process(tmp_path):
    """The second one is refused and names the first, and the first one is not disturbed."""
    file, out = write(tmp_path, ".jsonl"), tmp_path / "out"
    refusals = []

    def try_again(progress):
        with pytest.raises(InputError, match=f"out is being prepared by process {os.getpid()}") as caught:
            prepare_shards([file], out, BYTES)
        refusals.append(caught)

    want = prepare_shards([file], tmp_path / "alone", BYTES, validation_fraction=0)
    assert prepare_shards([file], out, BYTES, validation_fraction=0, on_progress=try_again) == want
    assert refusals
    assert "process" not in want
    assert prepare_shards([file], out, BYTES, validation_fraction=0) == want  # the lock is released


INDEX_FAULTS = {
    "no complete": lambda index: index.pop("complete"),
    "complete as a number": lambda index: index.update(complete=1),
    "no tokenizer": lambda index: index.pop("tokenizer"),
    "no splits": lambda index: index.pop("splits"),
    "split as a list": lambda index: index["splits"].update(val=[]),
    "no sha256": lambda index: index["splits"]["train"]["done"][0].pop("sha256"),
    "short sha256": lambda index: index["splits"]["train"]["done"][0].update(sha256="ab"),
    "name as a number": lambda index: index["splits"]["train"]["done"][0].update(name=5),
    "another folder": lambda index: index["splits"]["train"]["done"][0].update(name="../other/train_000000.bin"),
    "another split": lambda index: index["splits"]["val"].update(done=index["splits"]["train"]["done"]),
    "the same shard twice": lambda index: index["splits"]["train"]["done"].append(index["splits"]["train"]["done"][0]),
    "shard as null": lambda index: index["splits"]["train"]["done"].__setitem__(0, None),
    "negative tokens": lambda index: index["splits"]["train"]["done"][0].update(tokens=-1),
    "tokens as text": lambda index: index["splits"]["train"]["done"][0].update(tokens="5"),
    "deep": lambda index: index.update(more=functools.reduce(lambda inner, _: [inner], range(300), [])),
}


@pytest.mark.parametrize("fault", INDEX_FAULTS)
def test_a_damaged_index_is_one_line(tmp_path, fault):
    file, out = write(tmp_path, ".jsonl"), tmp_path / "out"
    prepare_shards([file], out, BYTES, validation_fraction=0)
    index = json.loads((out / "index.json").read_text())
    INDEX_FAULTS[fault](index)
    (out / "index.json").write_text(json.dumps(index))
    for read in (
        lambda: load_corpus(str(out), BYTES),
        lambda: verify(out),
        lambda: prepare_shards([file], out, BYTES, validation_fraction=0),
    ):
        with pytest.raises(InputError, match=r"index\.json.*prepare again"):
            read()


def test_shards_without_their_index_still_name_their_tokenizer(tmp_path, vocab_bpe):
    prepare_shards([write(tmp_path, ".jsonl")], tmp_path / "out", BYTES, validation_fraction=0)
    (tmp_path / "out" / "index.json").unlink()
    for path in (tmp_path / "out", tmp_path / "out" / "train_000000.bin"):
        with pytest.raises(InputError, match="with a tokenizer of 257 tokens, but gpt2 has 50257"):
            load_corpus(str(path), GPT2Tokenizer(vocab_bpe))
        assert sum(load_corpus(str(path), BYTES).n_tokens) == len(expected(TEXTS))
