"""scripts/finetune.py --task classify: runs, resuming in the other framework, labels of a file, and refusals."""

import json
import signal

import convert
import evaluate
import finetune
import generate
import numpy as np
import pytest
import torch
import transformers
from support.interrupting import interrupted
from support.runs import command, metrics, run_program

import gpt_torch
from parity.config import GPTConfig
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.tuning.args import parse_tune_args
from parity.tuning.embedded import labeled_lists
from parity.tuning.labels import split_at_random
from parity.tuning.settings import TUNE_RECIPES
from parity.weights import classifier_files

SHAPE = ("--n-layer", 2, "--n-embd", 16, "--n-head", 2, "--n-ctx", 64)
OPTIONS = (
    "--task", "classify", "--preset", "rules-classify", "--steps", 6, "--eval-every", 3, "--batch-size", 4,
    "--accumulate", 2, "--lr", 0.01, "--dtype", "float64",
)  # fmt: skip
BOOK = ("--position", "last", "--head-bias", "--train-blocks", 1, "--balance", "--data", "data.tsv", *SHAPE)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with data.jsonl, forty texts of one bucket, data.tsv with the same, and the weights base/."""
    folder = tmp_path_factory.mktemp("labels")
    records = [record for record in labeled_lists() if 25 <= len(record["text"]) <= 32][:40]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    lines = [f"{'x' if record['label'] == 'tool' else 'y'}\t{record['text']}\n" for record in records]
    (folder / "data.tsv").write_text("".join(lines), encoding="utf-8")
    gpt_torch.save_pretrained(gpt_torch.GPTModel(GPTConfig(257, 64, 16, 2, 2), 3), folder / "base")
    return folder


def tune(workplace, *arguments, moment=None):
    words = command("finetune.py", *arguments) if moment is None else interrupted(*moment, "finetune.py", *arguments)
    return run_program(words, cwd=workplace)


@pytest.fixture(scope="module")
def runs(workplace):
    """{name: folder}: adapters in torch; the same, begun by JAX, killed, and ended by torch; the book's way."""
    lora = (*OPTIONS, "--data", "data.jsonl", "--init-from", "base", "--lora-rank", 2)
    whole = tune(workplace, "--backend", "torch", *lora, "--run", "whole")
    assert whole.returncode == 0, whole.stderr
    assert "4 labels (animal " in whole.stdout
    assert "label texts with it: python scripts/finetune.py --run whole --predict FILE --out FILE" in whole.stdout
    assert "chosen:  animal  color  fruit  tool" in whole.stdout
    kill = (signal.SIGKILL, "parity.training.loop:learning_rate:5")
    killed = tune(workplace, "--backend", "jax", *lora, "--run", "mixed", moment=kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    resumed = tune(workplace, "--backend", "torch", "--run", "mixed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    book = tune(workplace, "--backend", "torch", *OPTIONS, *BOOK, "--run", "book")
    assert book.returncode == 0, book.stderr
    return {name: workplace / name for name in ("whole", "mixed", "book")}


def test_a_run_reports_accuracy_and_confusions(runs):
    for name, count in (("whole", 4), ("book", 2)):
        evaluations = [entry for entry in metrics(runs[name]) if "validation_loss" in entry]
        assert [entry["step"] for entry in evaluations] == [0, 3, 6]
        for entry in evaluations:
            assert "perplexity" not in entry
            table = np.array(entry["confusions"])
            assert table.shape == (count, count)
            assert entry["accuracy"] == np.trace(table) / table.sum()
        samples = (runs[name] / "samples.txt").read_text(encoding="utf-8")
        assert samples.count("--- step ") == 3 * 4
        assert samples.count("chosen:") == 3
    config = json.loads((runs["book"] / "config.json").read_text())
    assert config["tune"]["task"] == "classify"


def test_the_other_backend_resumes_with_the_same_losses(runs):
    for a, b in zip(metrics(runs["mixed"]), metrics(runs["whole"]), strict=True):
        assert a.pop("confusions", None) == b.pop("confusions", None)
        assert a == pytest.approx(b, rel=1e-9)


def test_checkpoints(runs):
    files = {path.name for path in (runs["whole"] / "checkpoints" / "000006").iterdir()}
    adapter = {"adapter_config.json", "adapter_model.safetensors"}
    assert files == {*adapter, "classifier.json", "optimizer.safetensors", "manifest.json"}
    book = runs["book"] / "checkpoints" / "000006"
    options = classifier_files.read_options(book)
    assert (options.labels, options.position, options.bias) == (("x", "y"), "last", True)
    assert 25 <= options.length <= 32
    first, last = (classifier_files.read(runs["book"] / "checkpoints" / step).arrays for step in ("000000", "000006"))
    changed = {name for name in first if not np.array_equal(np.asarray(first[name]), np.asarray(last[name]))}
    assert changed
    assert all(name.startswith(("h.1.", "ln_f.")) for name in changed)


def test_both_backends_label_a_file_alike(runs, workplace):
    given = json.loads(f"[{', '.join((workplace / 'data.jsonl').read_text().splitlines()[:5])}]")
    (workplace / "test.json").write_text(json.dumps([*given, {"text": "Here are owl, pig and cow.", "id": 7}]))
    (workplace / "test.tsv").write_text("".join((workplace / "data.tsv").read_text().splitlines(True)[:3]))
    labeled = {}
    for run, file, backend in (
        ("mixed", "test.json", "torch"),
        ("mixed", "test.json", "jax"),
        ("book", "test.tsv", "jax"),
    ):
        out = f"{run}-{backend}.json"
        result = tune(workplace, "--backend", backend, "--run", run, "--predict", file, "--out", out)
        assert result.returncode == 0, result.stderr
        assert "labeled right, loss" in result.stdout
        labeled[run, backend] = json.loads((workplace / out).read_text())
    for entry in labeled["book", "jax"]:
        assert entry["label"] in entry["probabilities"]
        assert entry["correct"] == (entry["label"] == entry["model_label"])
    for a, b in zip(labeled["mixed", "torch"], labeled["mixed", "jax"], strict=True):
        assert a["model_label"] == b["model_label"] == max(a["probabilities"], key=a["probabilities"].get)
        assert a.pop("probabilities") == pytest.approx(b.pop("probabilities"), abs=1e-5)
        assert a.pop("loss", 0) == pytest.approx(b.pop("loss", 0), abs=1e-5)
        assert a == b
    last = json.loads((workplace / "mixed-torch.json").read_text())[-1]
    assert last.keys() == {"text", "id", "model_label", "probabilities"}


@pytest.mark.filterwarnings("ignore")
def test_transformers_opens_what_convert_writes(runs, workplace, monkeypatch, capsys):
    """The adapters are merged; the labels of both agree on the texts."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["convert.py", "whole", "out"])
    convert.main()
    assert "out: a classifier with the labels animal, color, fruit, tool" in capsys.readouterr().out
    model = transformers.AutoModelForSequenceClassification.from_pretrained("out").eval()
    own = gpt_torch.load_classifier(runs["whole"] / "checkpoints" / "000006")
    text = ByteTokenizer().encode("Here are owl, pig and cow.")
    with torch.inference_mode():
        theirs = model(torch.tensor([text])).logits.softmax(-1).numpy()
    np.testing.assert_allclose(gpt_torch.classify(own, [text]), theirs, rtol=0, atol=1e-6)
    monkeypatch.setattr("sys.argv", ["convert.py", "book", "other"])
    with pytest.raises(InputError, match=r"cannot hold this classifier: its head has a bias \(score\.bias\)"):
        convert.main()
    monkeypatch.setattr("sys.argv", ["convert.py", "whole", "other", "--to", "openai"])
    with pytest.raises(InputError, match="holds a classifier: only --to huggingface can"):
        convert.main()


@pytest.mark.parametrize("run", ["whole", "book"])
def test_a_classifiers_run_is_refused_where_text_is_wanted(runs, workplace, monkeypatch, run):
    monkeypatch.chdir(workplace)
    for script, arguments in (
        (generate, ["--run", run, "The ", "--backend", "torch"]),
        (evaluate, ["--run", run, "--protocol", "loss", "--corpus", "data.tsv", "--backend", "torch"]),
        (finetune, ["--init-from", run, "--preset", "rules"]),
    ):
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *arguments])
        with pytest.raises(InputError, match="holds a classifier, which answers with labels and not with text"):
            script.main()


BAD = {
    "one label": (("--data", "one.tsv"), r"one\.tsv: all 12 texts have the label 'a'; a classifier needs"),
    "rare label": (("--data", "rare.tsv"), r"rare\.tsv: of 31 texts for training none has the label 'b'"),
    "other form": (("--data", "data.csv"), r"data\.csv: this kind of file is not supported"),
    "blocks and adapters": (("--train-blocks", 1, "--lora-rank", 2), "exclude each other"),
    "too long": (
        ("--data", "data.tsv", "--overlong", "refuse", "--max-length", 20),
        "line .*: the text has .* than 20",
    ),
    "nothing left": (("--data", "data.tsv", "--overlong", "drop", "--max-length", 20), "too few texts have at most 20"),
    "a template": (("--template", "alpaca"), "--template is for the task instruct or prefer; leave it out"),
    "generation": (("--sample-tokens", 9), "--sample-tokens is for the task instruct or prefer; leave it out"),
    "other task": (("--task", "instruct", "--preset", "book-spam"), "--preset book-spam is for the task classify"),
    "no validation": (("--data", "data.tsv", "--validation-fraction", 0.01), "none is left for --validation-fraction"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_clear_error(monkeypatch, workplace, name):
    (workplace / "one.tsv").write_text("a\tsome text\n" * 12)
    held_out = split_at_random(list(range(45)), 123, 0.2, 0.1)[1][0]  # as for tests
    lines = [f"{'b' if number == held_out else 'a'}\tsome text\n" for number in range(45)]
    (workplace / "rare.tsv").write_text("".join(lines))
    arguments, message = BAD[name]
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, (*OPTIONS, *SHAPE, "--backend", "torch", *arguments))])
    with pytest.raises(InputError, match=message):
        finetune.main()


def test_the_books_preset():
    """Chapter 6: 130 steps an epoch of the 1,045 messages for training, five epochs, batches of eight."""
    recipe = TUNE_RECIPES["book-spam"]
    assert recipe.settings.steps == 5 * (1045 // 8)
    assert (recipe.settings.lr, recipe.settings.min_lr, recipe.settings.weight_decay) == (5e-5, 5e-5, 0.1)
    assert (recipe.tune.position, recipe.tune.head_bias, recipe.tune.train_blocks) == ("last", True, 1)
    offline = parse_tune_args(finetune.Args, None, ["--task", "classify"])
    assert (offline.preset, offline.settings.corpus, offline.settings.tokenizer) == ("rules-classify", "rules", "bytes")
