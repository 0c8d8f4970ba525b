"""finetune.py --task prefer: records, batches of pairs, run folders with their reference, and bad input."""

import json
import math
import shutil
import signal

import finetune
import numpy as np
import pytest
from support.interrupting import interrupted
from support.models import BACKENDS
from support.processes import finish, free_port, spawn
from support.runs import command, metrics, run_program

import gpt_torch
from parity.config import IGNORE_INDEX, GPTConfig
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.training import checkpoints
from parity.tuning import embedded
from parity.tuning.examples import bucket, fit
from parity.tuning.pairs import Pairs, encode_pair, preference
from parity.tuning.records import Record, read_records
from parity.weights import initial_weights
from parity.weights.digest import weights_sha256

BYTES = ByteTokenizer()
RECORD = {"instruction": "Name a color.", "input": "a warm one", "chosen": "Red.", "rejected": "red"}


def messages(*texts):
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts)]


CHAT = {
    "chosen": messages("Hello", "Hi.", "And you?", "Fine."),
    "rejected": messages("Hello", "Hi.", "And you?", "Bad."),
}


def one(folder, fields):
    file = folder / "data.json"
    file.write_text(json.dumps([fields]), encoding="utf-8")
    [record] = read_records(file)
    return preference(record)


# Records


def test_forms_of_preferences(tmp_path):
    pair = one(tmp_path, RECORD)
    assert [c.turns for c in pair] == [(("Name a color.", "a warm one", text),) for text in ("Red.", "red")]
    prompt = {"prompt": "Name a color.", "chosen": "Red.", "rejected": " red\n"}
    assert [c.turns for c in one(tmp_path, prompt)] == [(("Name a color.", "", text),) for text in ("Red.", "red")]
    chat = one(tmp_path, CHAT)
    assert [[turn.response for turn in c.turns] for c in chat] == [["Hi.", "Fine."], ["Hi.", "Bad."]]
    divided = {"prompt": CHAT["chosen"][:3], "chosen": CHAT["chosen"][3:], "rejected": CHAT["rejected"][3:]}
    assert one(tmp_path, divided) == chat


BAD_RECORDS = {
    "no rejected": ({"instruction": "a", "chosen": "b"}, "item 1: the field 'rejected' is missing"),
    "no chosen": ({"instruction": "a", "rejected": "b"}, "item 1: the field 'chosen' is missing"),
    "empty": ({**RECORD, "rejected": " "}, "item 1: the field 'rejected' is empty"),
    "number": ({**RECORD, "chosen": 3}, "item 1: the field 'chosen' must be text, got 3"),
    "no preference": (
        {"instruction": "a", "output": "b"},
        "item 1: the fields 'instruction', 'output' are none of the",
    ),
    "no instruction": (
        {"chosen": "a", "rejected": "b"},
        "item 1: the fields 'chosen', 'rejected' are none of the known",
    ),
    "list and text": ({**CHAT, "rejected": "b"}, "item 1: the field 'rejected' must be a list of messages"),
    "other prompts": (
        {**CHAT, "rejected": messages("Hello", "Ho.", "And you?", "Bad.")},
        "item 1: the messages of 'chosen' and 'rejected' differ before the last one",
    ),
    "no answer": ({**CHAT, "rejected": messages("Hello")}, "item 1, rejected: the conversation does not end with a"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_one_clear_error(tmp_path, name):
    fields, message = BAD_RECORDS[name]
    with pytest.raises(InputError) as error:
        one(tmp_path, fields)
    assert f"{tmp_path / 'data.json'}, {message}" in str(error.value)


def test_the_embedded_preferences_are_always_the_same():
    records = embedded.preferences()
    assert records == embedded.preferences()
    assert [r["chosen"] for r in records] == [r["output"] for r in embedded.instructions()]
    assert all(r["chosen"] != r["rejected"] for r in records)
    letters = [r for r in records if "letter" in r["instruction"]]
    assert all(r["rejected"] in r["input"] for r in letters)
    kinds = {r["rejected"] for r in records} - {r["rejected"] for r in letters}
    assert kinds == {"animal", "fruit", "color", "tool", "even", "odd"}


# Batches


def scored(text):
    return BYTES.decode(text.targets[text.targets != IGNORE_INDEX])


def test_the_last_response_is_scored(tmp_path):
    pair = encode_pair(one(tmp_path, RECORD), BYTES)
    assert [scored(text) for text in pair[:2]] == ["Red.<|endoftext|>", "red<|endoftext|>"]
    assert BYTES.decode(pair.rejected.inputs).endswith("### Input:\na warm one\n\n### Response:\nred")
    chat = encode_pair(one(tmp_path, CHAT), BYTES)
    assert [scored(text) for text in chat[:2]] == ["Fine.<|endoftext|>", "Bad.<|endoftext|>"]
    assert BYTES.decode(chat.chosen.inputs).startswith("### Instruction:\nHello\n\n### Response:\nHi.<|endoftext|>###")


def test_batches_of_pairs(tmp_path):
    """Both texts of a pair are padded to one length, and the reference stays with its pair."""
    pairs = Pairs([encode_pair(preference(record), BYTES) for record in records_of(11)], 96, BYTES.eos_id)
    pairs.set_reference(np.arange(22.0).reshape(11, 2))
    seen = []
    for inputs, targets, reference in pairs.in_order(4):
        T = bucket(max(pair.length for pair in pairs.examples[len(seen) : len(seen) + 4]), 96)
        assert inputs.shape == targets.shape == (4, 2 * T)
        assert reference.shape == (4, 2)
        for row in range(4):
            texts = [scored(text._replace(targets=part)) for text, part in zip(pairs.examples[0][:2],
                     targets[row].reshape(2, -1), strict=True)]  # fmt: skip
            if len(seen) < 11:
                example = pairs.examples[len(seen)]
                assert texts == [scored(text) for text in example[:2]]
                np.testing.assert_array_equal(inputs[row, : example.chosen.length], example.chosen.inputs)
                np.testing.assert_array_equal(inputs[row, T : T + example.rejected.length], example.rejected.inputs)
            else:
                assert texts == ["", ""]
            seen.append(tuple(reference[row]))
    assert seen == [(2.0 * n, 2.0 * n + 1) for n in range(11)] + [(0, 0)]
    for places in ([0, 1], [3], []):
        for array, whole in zip(pairs.batch(0, 1, 4, places), pairs.batch(0, 1, 4), strict=True):
            np.testing.assert_array_equal(array, whole[places])


def records_of(count):
    """Records that prefer an answer with a capital letter and a full stop."""
    questions = [record for record in embedded.instructions() if record["instruction"] == "Even or odd?"][:count]
    records = []
    for number, fields in enumerate(questions, 1):
        answer = fields["output"]
        entry = {**fields, "chosen": answer.capitalize() + ".", "rejected": answer}
        records.append(Record(entry, f"item {number}"))
    return records


def test_overlong_pairs():
    """A pair is cut in both texts, and left out if nothing remains of one response."""
    pairs = [encode_pair(preference(record), BYTES) for record in records_of(3)]
    origins = ["one", "two", "three"]
    n_prompt = int((pairs[0].chosen.targets == IGNORE_INDEX).sum())
    cut = fit(pairs, origins, n_prompt + 2)
    assert str(cut) == "3 cut, 0 dropped"
    assert [len(scored(text)) for text in cut.examples[0][:2]] == [2, 2]
    with pytest.raises(InputError, match=f"none of the 3 examples fits into {n_prompt} positions"):
        fit(pairs, origins, n_prompt)
    with pytest.raises(InputError, match="one: the example has"):
        fit(pairs, origins, n_prompt, "refuse")


# Runs

OPTIONS = (
    "--task", "prefer", "--init-from", "base", "--data", "data.jsonl", "--steps", 4, "--eval-every", 2, "--lr", 0.003,
    "--batch-size", 4, "--accumulate", 2, "--eval-items", 2, "--sample-tokens", 3, "--validation-fraction", 0.2,
    "--dtype", "float64",
)  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with 30 preferences in data.jsonl, and a small model of bytes in base/."""
    folder = tmp_path_factory.mktemp("preferences")
    lines = [record.fields for record in records_of(30)]
    lines[3] = {**lines[3], "rejected": lines[3]["chosen"]}
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    config = GPTConfig(n_vocab=257, n_ctx=96, n_embd=16, n_head=2, n_layer=1)
    gpt_torch.save_pretrained(gpt_torch.GPTModel(config, seed=3), folder / "base")
    return folder


def tune(workplace, *arguments, moment=None):
    words = command("finetune.py", *arguments) if moment is None else interrupted(*moment, "finetune.py", *arguments)
    return run_program(words, cwd=workplace)


@pytest.fixture(scope="module")
def run(workplace):
    result = tune(workplace, "--backend", "torch", *OPTIONS, "--run", "run")
    assert result.returncode == 0, result.stderr
    return workplace / "run", result.stdout


def test_a_run_leaves_its_folder(run):
    folder, output = run
    assert "21 pairs (0 cut, 0 dropped), 6 for validation (0 cut, 0 dropped), 3 for tests; 1 with two equal" in output
    assert "reference  computing the log-probabilities of the initial weights" in output
    config = json.loads((folder / "config.json").read_text())
    assert (config["preset"], config["tune"]["task"], config["tune"]["dpo_logprobs"]) == ("prefer", "prefer", "sum")
    evaluations = [entry for entry in metrics(folder) if "validation_loss" in entry]
    first, last = evaluations[0], evaluations[-1]
    assert first["validation_loss"] == math.log(2)
    assert first["reward_chosen"] == first["reward_rejected"] == first["margin"] == first["accuracy"] == 0
    assert last["validation_loss"] < first["validation_loss"]
    assert last["margin"] == pytest.approx(last["reward_chosen"] - last["reward_rejected"], rel=1e-9)
    assert last["margin"] > 0
    assert last["accuracy"] == 1
    assert {"exact_match", "ended"} <= last.keys()
    assert "perplexity" not in output
    model = GPTConfig(**config["model"])
    reference = json.loads((folder / "reference.json").read_text())
    assert reference["weights_sha256"] == weights_sha256(model, initial_weights(model, 3))
    assert (np.shape(reference["train"]), np.shape(reference["validation"])) == ((21, 2), (6, 2))
    assert np.max(reference["train"]) < -10


def test_a_run_of_the_other_backend_is_resumed(run, workplace):
    """A run that JAX begins and torch ends has the losses and the rewards of a run in torch."""
    kill = (signal.SIGKILL, "parity.training.loop:learning_rate:4")
    killed = tune(workplace, "--backend", "jax", *OPTIONS, "--run", "mixed", moment=kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert checkpoints.steps(workplace / "mixed" / "checkpoints") == [0, 2]
    kept = (workplace / "mixed" / "reference.json").read_bytes()
    resumed = tune(workplace, "--backend", "torch", "--run", "mixed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "computing the log-probabilities" not in resumed.stdout
    assert (workplace / "mixed" / "reference.json").read_bytes() == kept
    for a, b in zip(metrics(workplace / "mixed"), metrics(run[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)


@pytest.mark.parametrize("backend", [pytest.param(name, marks=pytest.mark.slow) for name in BACKENDS])
def test_adapters_and_exact_resume(workplace, backend):
    """A run of adapters that was killed and resumed has the metrics of one that was not, to the bit."""
    options = ("--backend", backend, *OPTIONS, "--lora-rank", 2, "--dpo-logprobs", "mean")
    assert tune(workplace, *options, "--run", f"lora-{backend}").returncode == 0
    kill = (signal.SIGKILL, "parity.training.loop:learning_rate:4")
    tune(workplace, *options, "--run", f"killed-{backend}", moment=kill)
    resumed = tune(workplace, "--backend", backend, "--run", f"killed-{backend}", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(workplace / f"killed-{backend}") == metrics(workplace / f"lora-{backend}")


def in_process(monkeypatch, workplace, *arguments):
    """Run the script in this process, so that its InputError can be seen; it fails before it trains."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, arguments)])
    return finetune.main()


def without(entries, key):
    return {name: value for name, value in entries.items() if name != key}


DAMAGE = {
    "missing": (None, r"reference\.json cannot be read \(No such file or directory\); restore it, or start a new run"),
    "changed": (lambda e: {**e, "train": [[0.0, 0.0]] * 21}, r"reference\.json is damaged, or belongs to other data"),
    "of other data": (lambda e: {**e, "corpus_sha256": "0" * 64}, "belongs to other data; restore it, or start a new"),
    "without a part": (lambda e: without(e, "validation"), r"reference\.json: validation is missing"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_reference_is_refused(monkeypatch, run, workplace, name, tmp_path):
    change, message = DAMAGE[name]
    shutil.copytree(run[0], tmp_path / "run")
    file = tmp_path / "run" / "reference.json"
    if change is None:
        file.unlink()
    else:
        file.write_text(json.dumps(change(json.loads(file.read_text()))))
    with pytest.raises(InputError, match=message):
        in_process(monkeypatch, workplace, "--backend", "torch", "--run", tmp_path / "run", "--resume")


BAD = {
    "no weights": (("--task", "prefer"), "--preset rules-prefer needs weights to start from"),
    "another task's preset": (
        ("--task", "prefer", "--preset", "instruct"),
        "is for the task instruct, not for --task",
    ),
    "beta": ((*OPTIONS, "--dpo-beta", 0), "dpo_beta must be a positive number, got 0"),
    "packing": ((*OPTIONS, "--packing"), "--packing is for the task instruct; leave it out"),
    "scored prompts": ((*OPTIONS, "--loss-on", "all"), "--loss-on is for the task instruct; leave it out"),
    "another task": (("--dpo-logprobs", "mean"), "--dpo-logprobs is for the task prefer; leave it out"),
    "no training": ((*OPTIONS, "--test-fraction", 0.9, "--validation-fraction", 0.1), "none is left for training"),
    "instructions": ((*OPTIONS, "--data", "instructions.json"), "item 1: the fields .* are none of the known forms"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_clear_error(monkeypatch, workplace, name):
    (workplace / "instructions.json").write_text('[{"instruction": "a", "output": "b"}]')
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message):
        in_process(monkeypatch, workplace, *arguments)


def test_damaged_weights_give_no_reference(monkeypatch, workplace, tmp_path):
    model = gpt_torch.load_pretrained(workplace / "base")
    model.final_norm.scale.data[:] = np.nan
    gpt_torch.save_pretrained(model, tmp_path / "nan")
    refused = pytest.raises(InputError, match="log-probabilities that are not finite; are they damaged")
    with pytest.warns(UserWarning, match="16 values that are not finite"), refused:
        in_process(monkeypatch, workplace, "--backend", "torch", *OPTIONS, "--init-from", tmp_path / "nan", "--run",
                   tmp_path / "run")  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("devices", ["mesh", "processes", "torchrun"])
def test_devices_share_the_pairs(run, workplace, tmp_path, devices):
    """On a mesh, and in two processes, the losses, rewards and log-probabilities of the reference are the same."""
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    join = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id")
    started = {
        "mesh": [(("--mesh", "fsdp=2,tensor=2"), {"JAX_NUM_CPU_DEVICES": "4"})],
        "processes": [((*join, index), {}) for index in range(2)],
        "torchrun": [(("--backend", "torch"), {**torchrun, "RANK": str(index)}) for index in range(2)],
    }[devices]
    files = ("--init-from", workplace / "base", "--data", workplace / "data.jsonl", "--run", tmp_path / "run")
    words = [(command("finetune.py", *OPTIONS, *files, *more), environment) for more, environment in started]
    for result in finish([spawn(word, **environment) for word, environment in words]):
        assert result[0] == 0, result
    for a, b in zip(metrics(tmp_path / "run"), metrics(run[0]), strict=True):
        assert a == pytest.approx(b, rel=1e-9, abs=1e-12)
    got, expected = (json.loads((folder / "reference.json").read_text()) for folder in (tmp_path / "run", run[0]))
    np.testing.assert_allclose(got["train"], expected["train"], rtol=1e-12)
