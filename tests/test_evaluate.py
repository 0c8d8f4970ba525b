"""scripts/evaluate.py: what it writes and prints, going on after a kill, comparison of models, and bad options."""

import contextlib
import hashlib
import io
import json
import shutil
import sys

import evaluate
import numpy as np
import pytest
from support.processes import finish, free_port, spawn
from support.runs import ROOT, run_script

from parity.config import GPTConfig
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError
from parity.evaluation import lambada
from parity.evaluation.data import DataFile
from parity.evaluation.records import Records
from parity.evaluation.weights import OPENAI_WEIGHTS
from parity.storage.download import RemoteFile
from parity.weights import huggingface, initial_weights

LINES = [
    {"text": f"{name} went to the {place}, and then back to the {place}"}
    for name in ("She", "He", "The old man") for place in ("house", "river", "cathedral")
]  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small models with GPT-2's vocabulary."""
    folder = tmp_path_factory.mktemp("models")
    config = GPTConfig(n_ctx=64, n_embd=24, n_head=2, n_layer=2)
    for seed in (0, 1):
        huggingface.write(folder / str(seed), config, initial_weights(config, seed), "huggingface", None)
    return folder


@pytest.fixture
def workplace(tmp_path, models, vocab_bpe, monkeypatch):
    """A folder with the file of LAMBADA, in which scripts run offline."""
    (tmp_path / "lambada_test.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "vocab.bpe").write_bytes(vocab_bpe.read_bytes())
    return tmp_path


@pytest.fixture
def run(models, monkeypatch, capsys):
    """Run the script in this process; returns its standard output."""

    def call(*options, backend="torch", model="0"):
        arguments = ["--model", models / model, "--backend", backend, "--no-compilation-cache", *options]
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
            evaluate.main()
        return capsys.readouterr().out

    return call


def add_up(folder):
    """Run the script with --finish; returns its standard output."""
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setattr(sys, "argv", ["evaluate.py", "--finish", "--out", folder])
        evaluate.main()
    return printed.getvalue()


LAST_WORD = ("--protocol", "lambada-openai/last-word", "--data", "lambada_test.jsonl")


def results(folder):
    return json.loads((folder / "results.json").read_text())["results"]


def records(folder):
    lines = [json.loads(line) for line in (folder / "items.jsonl").read_text().splitlines()]
    return sorted(lines, key=lambda line: (line["model"], line["protocol"], line["index"]))


@pytest.mark.parametrize("backend", ["torch", "jax"])
def test_a_result_states_what_it_is_of(run, workplace, models, backend):
    text = run(*LAST_WORD, "--out", "out", backend=backend)
    [result] = results(workplace / "out")
    assert result["protocol"] == "lambada-openai/last-word"
    assert (result["version"], result["items"], result["limit"], result["control"]) == (1, 9, None, False)
    assert (result["tokenizer"], result["backend"], result["dtype"]) == ("gpt2", backend, "float32")
    assert result["device"].startswith("cpu")
    content = (workplace / "lambada_test.jsonl").read_bytes()
    assert result["data"] == {
        "name": "lambada_test.jsonl",
        "sha256": hashlib.sha256(content).hexdigest(),
        "is_published": False,
    }
    [model] = result["models"]
    weights = (models / "0" / "model.safetensors").read_bytes()
    assert (model["weights_sha256"], model["openai_model"]) == (hashlib.sha256(weights).hexdigest(), None)
    items = records(workplace / "out")
    assert [item["target"] for item in items[:3]] == [" house", " river", " cathedral"]
    accuracy, perplexity = model["metrics"]["accuracy"], model["metrics"]["perplexity"]
    assert accuracy["value"] == np.mean([item["correct"] for item in items])
    assert perplexity["value"] == pytest.approx(np.exp(-np.mean([item["logprob"] for item in items])))
    assert perplexity["unit"] == "per word"
    assert perplexity["standard_error"] > 0
    assert "lambada-openai/last-word (version 1): 9 items" in text
    assert f"{perplexity['value']:.4f}" in text
    assert "published" not in accuracy


def test_a_killed_evaluation_goes_on_to_the_same_results(run, workplace, monkeypatch):
    options = (*LAST_WORD, "--protocol", "lambada-openai/last-word", "lambada-core", "--batch-size", "2")
    run(*options, "--out", "whole")
    add, n_added = Records.add, [0]

    def killed(self, *arguments):
        add(self, *arguments)
        n_added[0] += 1
        if n_added[0] == 13:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--out", "killed")
    assert len(records(workplace / "killed")) == 13
    assert results(workplace / "killed") == results(workplace / "whole")[:1]
    run(*options, "--out", "killed")
    assert (workplace / "killed" / "results.json").read_text() == (workplace / "whole" / "results.json").read_text()
    assert records(workplace / "killed") == records(workplace / "whole")
    with pytest.raises(InputError, match="limit was None and is now 3"):
        run(*options, "--limit", "3", "--out", "killed")
    with pytest.raises(InputError, match="weights_sha256 was"):
        run(*options, "--out", "killed", model="1")


def test_parts_in_any_order_add_up_to_the_same_files(run, workplace, models):
    options = ("--protocol", "lambada-openai/last-word", "lambada-core", "--data", "lambada_test.jsonl")
    options += ("--compare", models / "1", "--batch-size", "2")
    run(*options, "--out", "whole")
    for index in (2, 0, 1):
        text = run(*options, "--out", "out", "--part", f"{index}/3")
        assert f"of 9 items, part {index}/3" in text
    assert {path.name for path in (workplace / "out").iterdir()} == {f"0000{k}-of-00003" for k in range(3)}
    (workplace / "lambada_test.jsonl").unlink()  # neither data nor models are needed
    text = add_up("out")
    assert (workplace / "out" / "results.json").read_bytes() == (workplace / "whole" / "results.json").read_bytes()
    assert records(workplace / "out") == records(workplace / "whole")
    assert "lambada-core (version 1): 9 items" in text
    assert "second model - first model, paired" in text
    assert add_up("out") == text


def test_parts_that_do_not_belong_together(run, workplace, models, monkeypatch):
    options = (*LAST_WORD, "--batch-size", "2", "--out", "out")
    with pytest.raises(InputError, match="--out out has no parts"):
        add_up("out")
    run(*options, "--part", "0/3")
    with pytest.raises(InputError, match=r"missing are --part 1/3, 2/3"):
        add_up("out")
    with pytest.raises(InputError, match="is not empty"):
        run(*options)
    run(*options, "--part", "1/3")
    run(*options, "--part", "2/3", model="1")
    with pytest.raises(InputError, match=r"part 2/3 was computed with other options than part 0/3: weights_sha256"):
        add_up("out")
    with pytest.raises(InputError, match="weights_sha256 was"):
        run(*options, "--part", "2/3")
    shutil.rmtree(workplace / "out" / "00002-of-00003")

    def killed(self, *arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Records, "add", killed)
        with pytest.raises(KeyboardInterrupt):
            run(*options, "--part", "2/3")
    with pytest.raises(InputError, match="part 2/3 is not finished: lambada-openai/last-word; start it again"):
        add_up("out")
    run(*options, "--part", "2/3")
    add_up("out")
    items = workplace / "out" / "00001-of-00003" / "items.jsonl"
    lines = items.read_text().splitlines(keepends=True)
    items.write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="of lambada-openai/last-word is missing"):
        add_up("out")
    items.write_text("".join(lines))
    settings = json.loads((workplace / "out" / "results.json").read_text())
    settings["settings"]["limit"] = 3
    (workplace / "out" / "results.json").write_text(json.dumps(settings))
    with pytest.raises(InputError, match="results of an evaluation with other options: limit was 3"):
        add_up("out")
    (workplace / "out" / "results.json").unlink()
    for index in range(3):
        path = workplace / "out" / f"0000{index}-of-00003" / "results.json"
        path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(InputError, match="version 0 of lambada-openai/last-word, whose version is now 1"):
        add_up("out")
    (workplace / "out" / "00000-of-00002").mkdir()
    with pytest.raises(InputError, match="has parts of 2 and of 3"):
        add_up("out")


def test_another_model_on_the_same_items(run, workplace, models):
    text = run(*LAST_WORD, "--compare", models / "1", "--limit", "5", "--out", "out")
    [result] = results(workplace / "out")
    a, b = ([item["logprob"] for item in records(workplace / "out") if item["model"] == label] for label in "ab")
    assert len(a) == len(b) == result["items"] == result["limit"] == 5
    values = [model["metrics"]["perplexity"]["value"] for model in result["models"]]
    difference = result["differences"]["perplexity"]
    assert difference["value"] == pytest.approx(values[1] - values[0])
    slopes = [value * (np.array(x) - np.mean(x)) for value, x in zip(values, (a, b), strict=True)]
    assert difference["standard_error"] == pytest.approx(np.std(slopes[1] - slopes[0], ddof=1) / np.sqrt(5))
    assert "the first 5 items" in text
    assert "second model - first model, paired" in text
    run(*LAST_WORD, "--compare", models / "0", "--limit", "5", "--out", "same")
    [same] = results(workplace / "same")
    assert same["differences"]["perplexity"]["value"] == same["differences"]["perplexity"]["standard_error"] == 0


def test_published_numbers_of_a_recognized_model(run, workplace, models, monkeypatch):
    """With stand-ins for the hashes of OpenAI's weights and of the published file."""
    content, weights = (
        path.read_bytes() for path in (workplace / "lambada_test.jsonl", models / "0" / "model.safetensors")
    )
    protocol = lambada.PROTOCOLS[0]
    file = DataFile(RemoteFile("x", 1, hashlib.sha256(content).hexdigest()), ("http://localhost:1/",))
    monkeypatch.setattr(evaluate, "find", lambda name: protocol.__class__(**{**vars(protocol), "data": file}))
    run(*LAST_WORD, "--out", "unknown")
    assert "published" not in results(workplace / "unknown")[0]["models"][0]["metrics"]["accuracy"]
    monkeypatch.setitem(OPENAI_WEIGHTS, hashlib.sha256(weights).hexdigest(), "124M")
    text = run(*LAST_WORD, "--out", "out")
    [model] = results(workplace / "out")[0]["models"]
    assert model["openai_model"] == "124M"
    published, perplexity = model["metrics"]["perplexity"]["published"], model["metrics"]["perplexity"]
    assert published["value"] == 40.0554
    assert published["difference_in_standard_errors"] == pytest.approx(
        (perplexity["value"] - 40.0554) / perplexity["standard_error"]
    )
    difference = f"difference {published['difference_in_standard_errors']:+.1f} standard errors"
    assert f"published: 40.0554 (EleutherAI/lm-evaluation-harness#2159), {difference}" in text
    for option in (("--limit", "9"), ("--control",)):
        run(*LAST_WORD, *option, "--out", option[0].strip("-"))
        metrics = results(workplace / option[0].strip("-"))[0]["models"][0]["metrics"]
        assert "published" not in metrics["perplexity"]


def test_controls_stop_words_and_corpora(run, workplace):
    run(*LAST_WORD, "--out", "plain")
    text = run(*LAST_WORD, "--control", "--out", "control")
    assert "each with another one's context (control)" in text
    plain, control = (records(workplace / name) for name in ("plain", "control"))
    assert [item["target"] for item in plain] == [item["target"] for item in control]
    assert all(a["logprob"] != b["logprob"] for a, b in zip(plain, control, strict=True))

    tokenizer = load_tokenizer("gpt2")
    (workplace / "words.txt").write_text("")
    options = ("--protocol", "lambada-openai/stop-words", "--data", "lambada_test.jsonl")
    with pytest.raises(InputError, match=r"words\.txt is empty"):
        run(*options, "--stop-words", "words.txt", "--out", "stop")
    run(*options, "--out", "ours")
    firsts = {tokenizer.decode([item["first_token"]]) for item in records(workplace / "ours")}
    (workplace / "words.txt").write_text(" ".join(first.strip() for first in firsts))
    run(*options, "--stop-words", "words.txt", "--out", "stop")
    assert not firsts & {tokenizer.decode([item["first_token"]]) for item in records(workplace / "stop")}

    (workplace / "text.txt").write_text("A text with some words. " * 30)
    text = run("--protocol", "loss", "--corpus", "text.txt", "--split", "all", "--out", "loss")
    [result] = results(workplace / "loss")
    assert result["data"]["name"] == "text.txt, all"
    metrics = result["models"][0]["metrics"]
    items = records(workplace / "loss")
    n_tokens = len(tokenizer.encode("A text with some words. " * 30))
    assert sum(item["tokens"] for item in items) == n_tokens + 1  # with the end-of-text token that ends the document
    nats = -sum(item["logprob"] for item in items)
    assert metrics["loss"]["value"] == pytest.approx(nats / (n_tokens + 1))
    bits = -sum(item["text_logprob"] for item in items) / np.log(2)
    assert metrics["bits_per_byte"]["value"] == pytest.approx(bits / (24 * 30))
    assert "nats per token" in text


def test_the_list_shows_every_protocol(run, workplace):
    text = run("--list")
    for name in ("lambada-openai/last-word", "core", "loss"):
        assert f"{name} (version 1)" in text
    assert "sha256 4aa8d02cd17c719165fc8a7887fddd641f43fcafa4b1c806ca8abc31fabdb226" in text
    assert "published: 124M accuracy 0.3256 (EleutherAI/lm-evaluation-harness#2159)" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "give --protocol NAME"),
        (("--protocol", "lambada"), "unknown protocol 'lambada'; choose from"),
        ((*LAST_WORD, "--limit", "0"), "--limit must be at least 1"),
        ((*LAST_WORD, "--batch-size", "0"), "--batch-size 0"),
        ((*LAST_WORD, "--corpus", "x"), "--corpus is for --protocol loss"),
        ((*LAST_WORD, "--split", "all"), "--split is for --protocol loss"),
        (("--protocol", "loss", "--corpus", "x", "--data", "y"), "--data is for protocols with a file of their own"),
        ((*LAST_WORD, "--checkpoint", "best"), "--checkpoint best chooses a checkpoint of --run"),
        ((*LAST_WORD, "--stop-words", "x"), "--stop-words is for"),
        ((*LAST_WORD, "--part", "2/2"), "--part 2/2: give k/n"),
        (("--finish",), "--finish needs --out"),
        (("--finish", "--out", "out"), "--finish takes no options but --out"),
        ((*LAST_WORD, "--mesh", "data=2"), "--mesh is for --backend jax"),
        (("--protocol", "loss", "--control"), "--control exchanges contexts, which loss does not have"),
        (("--protocol", "loss"), "the protocol loss needs --corpus"),
        (("--protocol", "core"), "the protocol core needs --data"),
        (("--protocol", "hellaswag/completion"), "hellaswag_val.jsonl is missing, and downloads are forbidden"),
        (("--protocol", "ptb", "--data", "nothing"), "--data nothing is neither a file nor a folder"),
        (("--protocol", "wikitext-2/hf-1024", "--data", "lambada_test.jsonl"), "needs a model with a context of 1024"),
        ((*LAST_WORD, "--compare", "nothing"), "nothing is not a folder with weights"),
    ],
)
def test_bad_options(run, workplace, options, message):
    with pytest.raises(InputError) as error:
        run(*options)
    assert message in str(error.value)
    assert not (workplace / "evaluations").exists()


def test_the_script_as_a_program(workplace, models):
    """Its default folder, and an error in one line."""
    options = ("--model", models / "0", "--backend", "torch", *LAST_WORD)
    result = run_script("evaluate.py", *options, cwd=workplace)
    assert result.returncode == 0, result.stderr
    [folder] = (workplace / "evaluations").iterdir()
    assert folder.name.startswith("0-torch-")
    assert str(folder.relative_to(workplace)) in result.stdout
    assert len(records(folder)) == 9
    bad = run_script("evaluate.py", *options, "--data", workplace / "cache", cwd=workplace)
    assert bad.returncode == 2
    assert "holds no lambada_test.jsonl" in bad.stderr
    assert "Traceback" not in bad.stderr


@pytest.mark.slow
def test_devices_and_processes_give_the_same_records(workplace, models):
    """A mesh of two devices, two processes of JAX, and two of torchrun."""
    script = [sys.executable, ROOT / "scripts" / "evaluate.py", *LAST_WORD[:2], "--data", workplace]
    script += ["--model", models / "0"]
    address = f"127.0.0.1:{free_port()}"
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}

    def together(index):
        return "--coordinator", address, "--num-processes", 2, "--process-id", index

    started = {
        "torch": [(["--backend", "torch"], {})],
        "torchrun": [(["--backend", "torch"], {**torchrun, "RANK": str(index)}) for index in range(2)],
        "jax": [([], {})],
        "mesh": [(["--mesh", "data=2"], {"JAX_NUM_CPU_DEVICES": "2"})],
        "processes": [(together(index), {}) for index in range(2)],
    }
    found = {}
    for name, runs in started.items():
        out = workplace / name
        for result in finish([spawn([*script, *options, "--out", out], **more) for options, more in runs]):
            assert result[0] == 0, result
        found[name] = records(out)
    assert found["torch"] == found["torchrun"]  # each process computes whole batches
    assert found["mesh"] == found["processes"]
    for alone, shared in zip(found["jax"], found["mesh"], strict=True):
        # The products of a device have fewer rows, which may round in another order.
        for name in ("logprob", "margin"):
            assert shared.pop(name) == pytest.approx(alone.pop(name), rel=2e-5, abs=1e-6)
        assert shared == alone
    assert len(found["jax"]) == len(LINES)
