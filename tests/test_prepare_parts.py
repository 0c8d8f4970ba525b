"""A corpus that is prepared in parts, or by several processes, has the same bytes as one that is prepared at once."""

import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
import threading
import zlib

import numpy as np
import pytest
from support.corpora import (
    SETTINGS,
    KilledInFirstPass,
    KilledInSecondPass,
    prepared_files,
    split_tokens,
    write_mixed,
)
from support.runs import ROOT, run_script

from parity.data import assembly, preparation, shards, splits
from parity.data.engines import Processes, ThisProcess
from parity.data.shards import Request, finish_parts, prepare_part, prepare_shards
from parity.data.token_files import read_bin
from parity.data.tokenizer import ByteTokenizer, GPT2Tokenizer
from parity.errors import InputError
from parity.parts import Part

BYTES = ByteTokenizer()


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """Folder of sources, and the texts in it."""
    folder = tmp_path_factory.mktemp("mixed") / "in"
    return folder, write_mixed(folder)


def in_parts(request, count, order=None):
    """Do all parts of both passes in a random order."""
    order = order or random.Random(0)
    for stage in (1, 2):
        parts = [Part(index, count) for index in range(count)]
        order.shuffle(parts)
        for part in parts:
            prepare_part(request, part, stage)
    return finish_parts(request)


@pytest.mark.parametrize("setting", SETTINGS)
def test_parts_and_one_process_give_the_same_bytes(tmp_path, mixed, vocab_bpe, setting):
    (source, texts), options = mixed, SETTINGS[setting]
    tokenizer = GPT2Tokenizer(vocab_bpe)
    index = prepare_shards([source], tmp_path / "whole", tokenizer, **options)
    expected = split_tokens(texts, options["validation_fraction"], tokenizer)
    for split, ids in expected.items():
        names = [shard["name"] for shard in index["splits"][split]["done"]]
        stored = [np.empty(0, np.uint16), *(read_bin(tmp_path / "whole" / name) for name in names)]
        np.testing.assert_array_equal(np.concatenate(stored), ids)
    assert in_parts(Request([source], tmp_path / "parts", tokenizer, **options), 3) == index
    assert prepared_files(tmp_path / "parts") == prepared_files(tmp_path / "whole")


def test_there_may_be_more_parts_than_files(tmp_path, mixed):
    source, _ = mixed
    in_parts(Request([source], tmp_path / "parts", BYTES), 20)
    prepare_shards([source], tmp_path / "whole", BYTES)
    assert prepared_files(tmp_path / "parts") == prepared_files(tmp_path / "whole")


def test_processes_give_the_same_bytes(tmp_path, mixed, vocab_bpe, monkeypatch):
    """As a plain prepare_data.py chooses them for large sources."""
    monkeypatch.setattr(shards, "_PROCESS_BYTES", 1000)
    (source, _), options = mixed, SETTINGS["shards larger than files"]
    tokenizer = GPT2Tokenizer(vocab_bpe)
    used = []
    monkeypatch.setattr(Processes, "map", lambda *given, map=Processes.map: used.append(1) or map(*given))
    progress = []
    index = prepare_shards([source], tmp_path / "2", tokenizer, **options, workers=2, on_progress=progress.append)
    assert len(used) == 2
    assert prepare_shards([source], tmp_path / "1", tokenizer, **options) == index
    assert prepared_files(tmp_path / "2") == prepared_files(tmp_path / "1")
    assert progress[-1].shards == len(list((tmp_path / "1").glob("*.bin")))
    assert progress[-1].tokens == sum(shard["tokens"] for s in index["splits"].values() for shard in s["done"])


def test_the_shards_of_one_file_are_written_by_several_processes(tmp_path, mixed, monkeypatch):
    monkeypatch.setattr(shards, "_PROCESS_BYTES", 1000)
    used = []
    monkeypatch.setattr(shards, "Processes", lambda count, threads: used.append((count, threads)) or ThisProcess())
    monkeypatch.setattr(shards, "ThisProcess", lambda threads: used.append((1, threads)) or ThisProcess())
    source = mixed[0] / "a.jsonl"
    index = prepare_shards([source], tmp_path / "out", BYTES, shard_tokens=1000, workers=8)
    assert used[0] == (1, 8)
    n_shards = sum(len(split["done"]) for split in index["splits"].values())
    assert used[1:] == [(min(8, n_shards), 8 // min(8, n_shards))]
    assert n_shards > 1


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_plain_call_overtakes_a_part_of_the_second_pass(tmp_path, mixed, monkeypatch, is_finished):
    """It deletes tokens that are in shards, and at last all results, while the part reads them."""
    (source, _), options = mixed, SETTINGS["shards larger than files"]
    request = Request([source], tmp_path / "out", BYTES, **options)
    prepare_part(request, Part(0, 1), 1)
    content = assembly._content

    def overtaken(preparation, starts, split, *rest):
        if split == "train":
            with monkeypatch.context() as patch:
                patch.setattr(assembly, "_content", content)
                if not is_finished:
                    patch.setattr(shards, "finish", lambda *_: None)
                with contextlib.nullcontext() if is_finished else pytest.raises(InputError, match="not fully prepared"):
                    prepare_shards([source], request.out, BYTES, **options)
        return content(preparation, starts, split, *rest)

    monkeypatch.setattr(assembly, "_content", overtaken)
    prepare_part(request, Part(0, 1), 2)
    monkeypatch.undo()
    finish_parts(request)
    prepare_shards([source], tmp_path / "whole", BYTES, **options)
    assert prepared_files(tmp_path / "out") == prepared_files(tmp_path / "whole")


def test_a_file_that_vanishes_does_not_hide_the_reason(tmp_path, mixed):
    class Failing(ThisProcess):
        def map(self, function, calls):
            (tmp_path / "out/work/000000.tokens").symlink_to("renamed")
            raise InputError("the first bad file")

    with pytest.raises(InputError, match="the first bad file"):
        prepare_shards([mixed[0]], tmp_path / "out", BYTES, engine=Failing())


@pytest.mark.parametrize(("tokenizer", "use", "stage"), [(KilledInFirstPass, 4, 1), (KilledInSecondPass, 1, 2)])
def test_a_killed_process_costs_no_token(tmp_path, mixed, tokenizer, use, stage):
    (source, _), options = mixed, SETTINGS["shards larger than files"]
    arguments = ([source], tmp_path / "out", tokenizer(tmp_path / "killed", use))
    with pytest.raises(InputError, match=r"a process that prepared the corpus died.*run the same command again"):
        prepare_shards(*arguments, **options, engine=Processes(2))
    assert (tmp_path / "killed").exists()
    assert (tmp_path / "out" / "work" / "starts.json").exists() == (stage == 2)
    index = prepare_shards(*arguments, **options, engine=Processes(2))
    assert index == prepare_shards([source], tmp_path / "whole", BYTES, **options)
    assert prepared_files(tmp_path / "out") == prepared_files(tmp_path / "whole")


def test_processes_end_with_their_parent():
    """Even if it is killed while they work: the end of their common output comes when the last of them is gone."""
    program = "from parity.data.engines import Processes; from support.corpora import announce_and_wait as wait; "
    command = [sys.executable, "-c", program + "next(Processes(2).map(wait, [(), ()]))"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT / "tests"), str(ROOT)])}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment) as parent:
        assert [parent.stdout.readline() for _ in range(2)] == [b"begun\n"] * 2
        parent.kill()
        assert parent.stdout.read() == b""


def test_two_workers_may_do_the_same_part(tmp_path, mixed):
    """As when a scheduler has lost sight of one that still works."""
    (source, _), options = mixed, SETTINGS["shards larger than files"]
    request = Request([source], tmp_path / "twice", BYTES, **options)
    failures = []

    def work(stage):
        try:
            prepare_part(request, Part(0, 1), stage)
        except BaseException as error:
            failures.append(error)

    for stage in (1, 2):
        workers = [threading.Thread(target=work, args=(stage,)) for _ in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    assert not failures
    assert finish_parts(request) == prepare_shards([source], tmp_path / "once", BYTES, **options)
    assert prepared_files(tmp_path / "twice") == prepared_files(tmp_path / "once")


def test_missing_parts_are_named(tmp_path, mixed):
    source, _ = mixed
    request = Request([source], tmp_path / "out", BYTES, shard_tokens=1000)
    prepare_part(request, Part(1, 3), 1)
    with pytest.raises(InputError, match=r"tokens of 5 of 8 files are missing; the first is .*a\.jsonl") as caught:
        prepare_part(request, Part(0, 3), 2)
    assert str(caught.value).endswith("run the first pass of --part 0/3, --part 2/3")
    with pytest.raises(InputError, match=r"first pass of .*out is not complete"):
        finish_parts(request)
    for index in (0, 2):
        prepare_part(request, Part(index, 3), 1)
    prepare_part(request, Part(0, 3), 2)
    with pytest.raises(
        InputError, match=r"second pass of .*out is not complete: \d+ of \d+ shards are missing; .*train_"
    ):
        finish_parts(request)
    for index in (1, 2):
        prepare_part(request, Part(index, 3), 2)
    (tmp_path / "out" / "train_000001.bin").write_bytes(b"")
    with pytest.raises(InputError, match=r"1 of \d+ shards are missing; the first is train_000001\.bin"):
        finish_parts(request)
    prepare_part(request, Part(0, 1), 2)
    index = finish_parts(request)
    assert finish_parts(request) == index
    prepare_part(request, Part(0, 3), 1)  # a late one does nothing
    assert not (tmp_path / "out" / "work").exists()


@pytest.mark.parametrize("way", ["processes", "parts"])
def test_the_first_of_several_bad_files_is_reported(tmp_path, way):
    """Which one fails first does not matter: the first of them in order takes the longest."""
    for number in range(8):
        content = f'{{"text": "document {number}"}}\n' * (300 if number == 2 else 1)
        bad = "nonsense\n" if number in (2, 3, 6) else ""
        (tmp_path / f"{number}.jsonl").write_text(content + bad)
    files, message = [tmp_path / f"{number}.jsonl" for number in range(8)], r"2\.jsonl, line 301 is not valid JSON"
    request = Request(files, tmp_path / "out", BYTES)
    if way == "processes":
        with pytest.raises(InputError, match=message):
            prepare_shards(files, tmp_path / "out", BYTES, engine=Processes(2))
        return
    for index in reversed(range(8)):
        if index in (2, 3, 6):
            with pytest.raises(InputError, match=rf"{index}\.jsonl, line \d+ is not valid JSON"):
                prepare_part(request, Part(index, 8), 1)
        else:
            prepare_part(request, Part(index, 8), 1)
    with pytest.raises(InputError, match=message) as caught:
        prepare_part(request, Part(0, 8), 2)
    assert "--part 2/8, --part 3/8, --part 6/8;" in str(caught.value)


def test_other_versions_and_options_are_refused(tmp_path, mixed, monkeypatch):
    source, _ = mixed
    request = Request([source], tmp_path / "out", BYTES)
    prepare_part(request, Part(0, 2), 1)
    with pytest.raises(InputError, match="out was prepared with other shard_tokens; name another folder"):
        prepare_part(Request([source], tmp_path / "out", BYTES, shard_tokens=5), Part(1, 2), 1)
    with pytest.raises(InputError, match="out was prepared with other sources"):
        prepare_part(Request([source / "a.jsonl"], tmp_path / "out", BYTES), Part(1, 2), 1)
    monkeypatch.setattr(preparation.platform, "python_version", lambda: "3.99.1")
    for stage in (1, 2):
        with pytest.raises(InputError, match=r"is being prepared with Python 3\.\d+\.\w+, but .* has Python 3\.99\.1"):
            prepare_part(request, Part(1, 2), stage)


def test_results_of_another_preparation_are_refused(tmp_path, mixed):
    """As when two machines began with different options at the same moment."""
    source, _ = mixed
    for size in (1000, 2000):
        prepare_part(Request([source], tmp_path / f"{size}", BYTES, shard_tokens=size), Part(0, 1), 1)
    for name in ("starts.json", "000000.json"):
        (tmp_path / "1000" / "work" / name).replace(tmp_path / "2000" / "work" / name)
        with pytest.raises(InputError, match=rf"{name} belongs to a preparation with other options; empty .*2000"):
            prepare_shards([source], tmp_path / "2000", BYTES, shard_tokens=2000)


DAMAGES = {
    "unit without its entries": ("000001.json", b""),
    "cut tokens": ("000001.tokens", b"1"),
    "cut lengths": ("000001.lengths", b"1"),
    "cut starts": ("starts.json", b'{"prep'),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_results_are_named(tmp_path, mixed, damage):
    (source, _), (name, content) = mixed, DAMAGES[damage]
    request = Request([source], tmp_path / "out", BYTES)
    for index in range(2):
        prepare_part(request, Part(index, 2), 1)
    (tmp_path / "out" / "work" / name).write_bytes(content)
    if name in ("000001.json", "000001.lengths"):  # these are read once, for starts.json
        (tmp_path / "out" / "work" / "starts.json").unlink()
    with pytest.raises(InputError, match=rf"{name}.*empty .*out and prepare again"):
        prepare_part(request, Part(0, 1), 2)


def test_an_exactly_full_last_shard_leaves_nothing_behind(tmp_path):
    """A preparation whose tokens end with a shard is like any other."""
    (tmp_path / "a.txt").write_text("x" * 29)  # and the end-of-text token
    index = prepare_shards([tmp_path / "a.txt"], tmp_path / "out", BYTES, validation_fraction=0, shard_tokens=10)
    assert [shard["tokens"] for shard in index["splits"]["train"]["done"]] == [10, 10, 10]
    assert index["splits"]["train"].keys() == index["splits"]["val"].keys() == {"done"}


def test_small_files_share_a_unit():
    for sizes in ([0], [5, 0, 7], [3] * 50_000, [1000, *[1] * 9000, 1000], [2**40, 10, 2**40]):
        first = preparation._first_sources(sizes)
        assert len(first) <= 2 * preparation._MOST_UNITS + 1
        most = min(preparation._UNIT_BYTES, sum(sizes) // preparation._MOST_UNITS)
        for begin, end in itertools.pairwise([*first, len(sizes)]):
            assert end == begin + 1 or sum(sizes[begin:end]) <= most
    assert len(preparation._first_sources([10**6] * 9)) == 9


def test_documents_are_divided_by_their_checksum():
    chance = random.Random(1)
    for first in (0, 1, 65_535, 10**9 + 7, 2**40 - 3, *(chance.randrange(2**50) for _ in range(5))):
        for fraction in (0, 0.005, 0.5, 0.999):
            wanted = [zlib.crc32((first + n).to_bytes(8, "little")) < fraction * 2**32 for n in range(300)]
            assert splits.is_validation(first, 300, fraction).tolist() == wanted
    long = splits.is_validation(65_000, 200_000, 0.3)
    for part in (0, 535, 536, 66_071, 66_072, 199_999):
        assert long[part] == splits.is_validation(65_000 + part, 1, 0.3)[0]


def test_ranges_contain_the_chosen_tokens():
    chance = np.random.default_rng(0)
    for _ in range(300):
        lengths = chance.integers(1, 6, chance.integers(1, 12)).astype(np.int64)
        chosen = chance.random(len(lengths)) < 0.6
        places = [place for place, mine in enumerate(np.repeat(chosen, lengths)) if mine]
        begin, end = sorted(chance.choice(np.arange(-3, len(places) + 4), 2, replace=False).tolist())
        ranges = assembly.find_ranges(lengths, chosen, begin, end)
        assert [place for low, high in ranges for place in range(low, high)] == places[max(begin, 0) : max(end, 0)]
        assert all(low < high for low, high in ranges)
        assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))


def test_units_are_read_in_blocks_of_documents(tmp_path, mixed, monkeypatch):
    (source, _), options = mixed, SETTINGS["shards larger than files"]
    prepare_shards([source], tmp_path / "whole", BYTES, **options)
    monkeypatch.setattr(splits, "_BLOCK", 7)
    prepare_shards([source], tmp_path / "blocks", BYTES, **options)
    assert prepared_files(tmp_path / "blocks") == prepared_files(tmp_path / "whole")


def test_tokens_are_deleted_as_soon_as_they_are_in_shards(tmp_path, mixed):
    """After a shard for training, only those of the units that end after it are left."""
    source, _ = mixed
    work, left, starts = tmp_path / "out" / "work", [], {}

    def look(progress):
        if progress.shards:
            starts.update(json.loads((work / "starts.json").read_text()))
            left.append({int(file.stem) for file in work.glob("*.tokens")})

    index = prepare_shards([source], tmp_path / "out", BYTES, shard_tokens=500, on_progress=look)
    n_validation, n_train = (len(index["splits"][split]["done"]) for split in ("val", "train"))
    assert len(left) == n_validation + n_train
    units = left[0]
    assert left[:n_validation] == [units] * n_validation
    ends = starts["train"][1:]
    assert left[n_validation:] == [{u for u in units if ends[u] > 500 * shard} for shard in range(1, n_train + 1)]
    assert len({len(numbers) for numbers in left}) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--part", "3/3"), r"--part 3/3: give k/n"),
        (("--part", "0/3", "--finish"), "--part and --finish exclude each other"),
        (("--part", "0/3", "--ray", "auto"), "--part and --ray exclude each other"),
        (("--pass", "1"), "--pass needs --part k/n"),
        (("--ray", "auto", "--workers", "2"), "--workers has no effect with --ray"),
        (("--finish", "--workers", "2"), "--workers has no effect with --finish"),
        (("--verify", "out", "--part", "0/3"), "nothing else; leave SOURCE, --out, --tokenizer, --part out"),
        (("--ray", "127.0.0.1:1"), "--ray 127.0.0.1:1: there is no cluster to connect to"),
        (("--ray", "ray://127.0.0.1:10001"), "give auto, local, or HOST:PORT of the cluster's head"),
        (("--part", "0/3", "--workers", "0"), "workers must be at least 1"),
        (("--shard-tokens", str(2**31)), "shard_tokens must be at least 1 and less than"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, mixed, options, message):
    source, _ = mixed
    result = run_script("prepare_data.py", source, "--out", tmp_path / "out", "--tokenizer", "bytes", *options)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_the_script_prepares_parts(tmp_path, mixed):
    source, _ = mixed
    arguments = (source, "--out", tmp_path / "out", "--tokenizer", "bytes", "--shard-tokens", "2000")
    for index, stage in [(1, 1), (0, 1), (0, 2), (1, 2)]:
        result = run_script("prepare_data.py", *arguments, "--part", f"{index}/2", "--pass", stage)
        assert result.returncode == 0, result.stderr
        assert f"part {index}/2 of pass {stage} is complete" in result.stdout
    result = run_script("prepare_data.py", *arguments, "--finish")
    assert result.returncode == 0, result.stderr
    prepare_shards([source], tmp_path / "whole", BYTES, shard_tokens=2000)
    assert prepared_files(tmp_path / "out") == prepared_files(tmp_path / "whole")
    index = json.loads((tmp_path / "out" / "index.json").read_text())
    assert sorted(index) == sorted(
        ["tokenizer", "sources", "text_field", "validation_fraction", "shard_tokens", "complete", "splits"]
    )
