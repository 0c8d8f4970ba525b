"""Evaluation below the protocols: estimates, files, records that go on after a kill, and results of both backends."""

import dataclasses
import hashlib
import io
import json
import math
import shutil
import tarfile
import zipfile

import numpy as np
import pytest
from support.models import BACKENDS, TINY, probing_weights

import gpt_jax
import gpt_torch
from parity import weights
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.evaluation import data
from parity.evaluation.catalog import PROTOCOLS
from parity.evaluation.data import Content, DataFile
from parity.evaluation.estimates import Metric, difference, estimate
from parity.evaluation.protocol import Task
from parity.evaluation.records import Records
from parity.evaluation.run import items_of, items_of_part, records_of
from parity.evaluation.scorer import Scorer
from parity.evaluation.weights import files_sha256, model_sha256
from parity.parts import Part
from parity.storage.download import RemoteFile
from parity.weights import huggingface, openai

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}


# Estimates


def rows(seed, n=40):
    generator = np.random.default_rng(seed)
    return [
        {"x": float(generator.normal(-5, 2)), "n": int(generator.integers(1, 9)), "g": "ab"[i % 2], "c": bool(i % 3)}
        for i in range(n)
    ]


def test_a_mean_has_the_usual_standard_error():
    values = [row["c"] for row in rows(0)]
    result = estimate(Metric("accuracy", "c", ""), rows(0))
    assert result.value == pytest.approx(np.mean(values))
    assert result.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)))


def test_perplexity_and_bits_are_functions_of_sums():
    """Not the mean of the items' own values: the sum is divided by the sum."""
    total = sum(row["x"] for row in rows(1)) / sum(row["n"] for row in rows(1))
    expected = {"nats": -total, "bits": -total / math.log(2), "perplexity": math.exp(-total), "mean": total}
    for transform, value in expected.items():
        assert estimate(Metric("m", "x", "", "n", transform), rows(1)).value == pytest.approx(value, rel=1e-12)
    per_item = np.mean([row["x"] / row["n"] for row in rows(1)])
    assert abs(per_item - total) > 0.1
    # The perplexity of LAMBADA is per word: items, not tokens.
    assert estimate(Metric("m", "x", "", None, "perplexity"), rows(1)).value == pytest.approx(
        math.exp(-np.mean([row["x"] for row in rows(1)]))
    )


@pytest.mark.parametrize("transform", ["nats", "bits", "perplexity"])
def test_standard_errors_are_those_of_repeated_samples(transform):
    """The spread of the metric over many sets of items, against the standard error of one set."""
    metric = Metric("m", "x", "", "n", transform)
    values = [estimate(metric, rows(seed, 200)) for seed in range(80)]
    spread = np.std([value.value for value in values], ddof=1)
    assert np.mean([value.standard_error for value in values]) == pytest.approx(spread, rel=0.2)


def test_groups_weigh_the_same():
    metric = Metric("m", "c", "", group="g")
    uneven = [row for i, row in enumerate(rows(2)) if row["g"] == "a" or i < 10]
    means = {name: np.mean([row["c"] for row in uneven if row["g"] == name]) for name in "ab"}
    result = estimate(metric, uneven)
    assert result.groups == pytest.approx(means)
    assert result.value == pytest.approx(np.mean(list(means.values())))
    assert result.value != pytest.approx(np.mean([row["c"] for row in uneven]))


def test_paired_differences():
    """Models that agree about the hard items differ by far less than their standard errors suggest."""
    a = rows(3)
    generator = np.random.default_rng(0)
    b = [{**row, "x": row["x"] + 0.1 + generator.normal(0, 0.05)} for row in a]
    metric = Metric("m", "x", "", None, "nats")
    result = difference(metric, a, b)
    changes = [y["x"] - x["x"] for x, y in zip(a, b, strict=True)]
    assert result.value == pytest.approx(-np.mean(changes))
    assert result.standard_error == pytest.approx(np.std(changes, ddof=1) / math.sqrt(len(changes)))
    assert result.standard_error < estimate(metric, a).standard_error / 10
    assert difference(Metric("m", "x", "", "n", "perplexity"), a, a).value == 0


def test_one_item_has_no_standard_error():
    assert estimate(Metric("m", "x", ""), rows(0, 1)).standard_error is None
    assert difference(Metric("m", "x", ""), rows(0, 1), rows(0, 1)).standard_error is None


# Files


TEXT = b"the text of the file\n"


def archives(folder):
    """Write an archive of each kind, and return the published file that each is."""
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("inside/file.txt", TEXT)
    with tarfile.open(folder / "a.tgz", "w:gz") as archive:
        member = tarfile.TarInfo("inside/file.txt")
        member.size = len(TEXT)
        archive.addfile(member, io.BytesIO(TEXT))
    result = {}
    for name in ("a.zip", "a.tgz"):
        content = (folder / name).read_bytes()
        remote = RemoteFile(name, len(content), hashlib.sha256(content).hexdigest())
        result[name] = DataFile(remote, ("http://localhost:1/a",), "inside/file.txt", hashlib.sha256(TEXT).hexdigest())
    return result


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_a_member_is_read_from_the_archive_or_by_itself(tmp_path, name):
    file = archives(tmp_path)[name]
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file.txt").write_bytes(TEXT)
    for path in (tmp_path / name, tmp_path / "folder", tmp_path / "folder" / "file.txt"):
        content = data.read(file, path)
        assert content.data == TEXT
        assert content.is_published
        assert content.sha256 == hashlib.sha256(TEXT).hexdigest()
    (tmp_path / "folder" / "file.txt").write_bytes(TEXT * 2)
    assert not data.read(file, tmp_path / "folder").is_published
    assert list(tmp_path.rglob("inside")) == []  # nothing was unpacked


@pytest.mark.parametrize("name", ["a.zip", "a.tgz"])
def test_bad_archives_are_named(tmp_path, name):
    file = archives(tmp_path)[name]
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=f"{name} is truncated or damaged"):
        data.read(file, tmp_path / name)
    (tmp_path / name).write_bytes(whole)
    with pytest.raises(InputError, match=f"{name} has no member other"):
        data.read(DataFile(file.file, file.addresses, "other"), tmp_path / name)


def test_missing_files_are_named(tmp_path, monkeypatch):
    file = DataFile(RemoteFile("x.jsonl", 5, "0" * 64), ("http://localhost:1/x.jsonl",))
    with pytest.raises(InputError, match="neither a file nor a folder"):
        data.read(file, tmp_path / "nothing")
    with pytest.raises(InputError, match=r"holds no x\.jsonl"):
        data.read(file, tmp_path)
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path))
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    with pytest.raises(InputError, match=r"x\.jsonl is missing, and downloads are forbidden .* --data"):
        data.read(file)
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "x.jsonl").write_text("short")
    with pytest.raises(InputError, match="is damaged or is another file"):
        data.read(file)


# Records


def test_records_go_on_after_a_kill(tmp_path):
    folder, settings = tmp_path / "out", {"limit": None, "protocols": {"p": {"version": 1}}}
    records = Records(folder, settings)
    assert records.done("p", "a") == {}
    records.add("p", "a", {"index": 3, "logprob": -1.25, "target": " é"})
    records.add("p", "b", {"index": 3, "logprob": -2.5})
    with pytest.raises(InputError, match="another process is writing"):
        Records(folder, settings)
    records.close()
    with (folder / "items.jsonl").open("ab") as file:
        file.write(b'{"protocol": "p", "model": "a", "ind')  # killed while writing
    reader = Records(folder, settings, writes=False)
    reader.add("p", "a", {"index": 5})
    again = Records(folder, settings)
    for opened in (reader, again):
        assert opened.done("p", "a") == {3: {"index": 3, "logprob": -1.25, "target": " é"}}
        assert opened.done("p", "b") == {3: {"index": 3, "logprob": -2.5}}
    again.add("p", "a", {"index": 4, "logprob": 0.0})
    again.finish([{"protocol": "p"}])
    again.close()
    assert [json.loads(line)["index"] for line in (folder / "items.jsonl").read_text().splitlines()] == [3, 3, 4]
    assert json.loads((folder / "results.json").read_text()) == {"settings": settings, "results": [{"protocol": "p"}]}


def test_records_of_other_options_are_refused(tmp_path):
    folder = tmp_path / "out"
    Records(folder, {"limit": 5, "dtype": "float32"}).close()
    with pytest.raises(InputError, match=r"other options: limit was 5 and is now None"):
        Records(folder, {"limit": None, "dtype": "float32"})
    (folder / "items.jsonl").write_text('{"protocol": "p"}\n')
    with pytest.raises(InputError, match=r"items\.jsonl, line 1: model is missing"):
        Records(folder, {"limit": 5, "dtype": "float32"})
    (folder / "results.json").write_text("{")
    with pytest.raises(InputError, match=r"results\.json is not valid JSON"):
        Records(folder, {"limit": 5, "dtype": "float32"})
    other = tmp_path / "other"
    other.mkdir()
    (other / "mine.txt").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        Records(other, {})


# Models


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """A Scorer of each backend, with the same weights of float32."""
    folder = tmp_path_factory.mktemp("model")
    config = dataclasses.replace(TINY, n_vocab=257)
    huggingface.write(folder, config, probing_weights(config, np.float32), "huggingface", None)
    return {name: Scorer(package, package.load_pretrained(folder), 4) for name, package in PACKAGES.items()}


def lambada_task(n_items=9):
    generator = np.random.default_rng(0)
    words = ["".join(chr(c) for c in generator.integers(97, 123, generator.integers(1, 4))) for _ in range(n_items * 4)]
    lines = [json.dumps({"text": " ".join(words[4 * i : 4 * i + 4])}) for i in range(n_items)]
    return Task(Content("\n".join(lines).encode(), "file", "0", True), ByteTokenizer(), TINY.n_ctx)


SWAG = [
    {"activity_label": "A", "ctx_a": f"b {n}", "ctx_b": "c", "ctx": f"b {n} c", "endings": list("pqrs"), "label": n % 4}
    for n in range(6)
]


@pytest.mark.parametrize("name", ["lambada-openai/last-word", "hellaswag/completion", "hellaswag/lm-eval"])
def test_both_backends_give_the_same_items(scorers, name):
    """float32: log-probabilities within rounding, and a choice may differ only where it is that close."""
    protocol = PROTOCOLS[name]
    task = lambada_task()
    if "hellaswag" in name:
        lines = "\n".join(map(json.dumps, SWAG))
        task = task._replace(content=Content(lines.encode(), "file", "0", True))
    items = items_of(protocol, task)
    records = {name: records_of(protocol, task, items, scorer, {}) for name, scorer in scorers.items()}
    for torch, jax in zip(records["torch"], records["jax"], strict=True):
        np.testing.assert_allclose(torch["logprob"], jax["logprob"], rtol=2e-5)
        assert torch["correct"] == jax["correct"]
    assert [record["index"] for record in records["jax"]] == list(range(len(items)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_evaluation_gives_the_same_bits(scorers, backend):
    protocol, task = PROTOCOLS["lambada-openai/last-word"], lambada_task()
    items = items_of(protocol, task)
    whole, added = records_of(protocol, task, items, scorers[backend], {}), []
    for n_done in (1, 4, 5):
        done = {record["index"]: record for record in whole[:n_done]}
        rest = records_of(protocol, task, items, scorers[backend], done, added.append)
        assert rest == whole
        assert sorted(record["index"] for record in added) == list(range(n_done, len(items)))
        added.clear()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", ["lambada-openai/last-word", "hellaswag/completion"])
def test_parts_give_the_same_bits(scorers, backend, name):
    protocol, task = PROTOCOLS[name], lambada_task(23)
    if "hellaswag" in name:
        lines = [{**line, "endings": ["p", "qq", "r" * 5, f"s {n}"]} for n, line in enumerate(SWAG)]
        task = task._replace(content=Content("\n".join(map(json.dumps, lines)).encode(), "file", "0", True))
    items = items_of(protocol, task)
    whole = records_of(protocol, task, items, scorers[backend], {})
    for count in (2, 3, 7):
        parts = []
        for index in reversed(range(count)):
            added = []
            parts.append(
                records_of(protocol, task, items, scorers[backend], {}, added.append, None, Part(index, count))
            )
            assert sorted(record["index"] for record in added) == [record["index"] for record in parts[-1]]
        assert sorted((record for part in parts for record in part), key=lambda record: record["index"]) == whole
        if count == 3 and "lambada" in name:
            assert all(parts)


def test_parts_have_about_as_many_tokens(scorers):
    """Windows of several articles: each is an item with requests in many batches."""
    generator = np.random.default_rng(0)
    letters = ["".join(chr(c) for c in generator.integers(97, 123, 25 + 85 * n % 300)) for n in range(30)]
    texts = [f" = A{n} =\n{text}\n" for n, text in enumerate(letters)]
    task = Task(Content("".join(texts).encode(), "file", "0", True), ByteTokenizer(), 8)
    protocol = PROTOCOLS["wikitext/lm-eval"]
    items = items_of(protocol, task)
    assert len(items) == 30
    n_tokens = [sum(len(r.context) + len(r.continuation) for r in item.requests) for item, _ in items]
    parts = [items_of_part(items, scorers["torch"], Part(index, 3)) for index in range(3)]
    assert sorted(index for part in parts for index in part) == list(range(30))
    loads = [sum(n_tokens[index] for index in part) for part in parts]
    assert max(loads) < 1.3 * sum(loads) / 3, loads
    empty = [(items[0][0]._replace(requests=()), 0)] * 2
    assert [len(items_of_part(empty, scorers["torch"], Part(index, 2))) for index in range(2)] == [2, 0]


def test_texts_of_no_tokens_and_options_of_several_requests(scorers):
    task = Task(Content(b"", "file", "0", True), ByteTokenizer(), TINY.n_ctx)
    protocol = PROTOCOLS["wikitext/lm-eval"]
    [record] = records_of(protocol, task, items_of(protocol, task), scorers["torch"], {})
    assert record == {"index": 0, "tokens": 0, "words": 1, "bytes": 0, "logprob": 0}  # as in the harness
    text = b" = A =\ntext of an article that has several windows\n"
    task = Task(Content(text, "file", "0", True), ByteTokenizer(), 8)
    items = items_of(protocol, task)
    assert len(items[0][0].requests) > 3
    [record] = records_of(protocol, task, items, scorers["torch"], {})
    parts = [score.logprob for _, score in sorted(scorers["torch"].score(items[0][0].requests))]
    assert record["logprob"] == pytest.approx(math.fsum(parts), rel=1e-12)


def test_weights_are_recognized_by_their_hash(tmp_path):
    arrays = probing_weights(TINY, np.float32)
    huggingface.write(tmp_path / "hf", TINY, arrays, "huggingface", None)
    file = tmp_path / "hf" / "model.safetensors"
    expected = hashlib.sha256(file.read_bytes()).hexdigest()
    assert files_sha256(tmp_path / "hf") == files_sha256(file) == expected
    openai.write(tmp_path / "tf", TINY, dict(weights.convert(arrays, "huggingface", "openai", TINY)))
    content = (tmp_path / "tf" / "model.ckpt.data-00000-of-00001").read_bytes()
    assert files_sha256(tmp_path / "tf") == hashlib.sha256(content).hexdigest()
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "model.safetensors.index.json").write_text("{}")
    for number in (1, 2):
        shutil.copy(file, shards / f"model-0000{number}-of-00002.safetensors")
    assert len(files_sha256(shards)) == 64
    assert files_sha256(shards) != expected
    assert files_sha256(tmp_path) is None


def test_adapters_make_another_model(tmp_path):
    """The hash is then that of the merged weights, whichever file they come from."""
    huggingface.write(tmp_path, TINY, probing_weights(TINY, np.float32), "huggingface", None)
    model = gpt_torch.load_pretrained(tmp_path)
    plain, merged = (model_sha256(gpt_torch, model, tmp_path, adapter) for adapter in (None, tmp_path))
    assert plain == files_sha256(tmp_path)
    assert merged != plain
    assert merged == model_sha256(gpt_jax, gpt_jax.load_pretrained(tmp_path), tmp_path / "config.json", tmp_path)
