"""scripts/finetune.py: run folders, equal losses in both backends, resuming, answers to a file, and bad options."""

import json
import signal

import finetune
import numpy as np
import pytest
from support.interrupting import interrupted
from support.models import BACKENDS
from support.processes import finish, free_port, spawn
from support.runs import command, metrics, run_program

from parity.errors import InputError
from parity.training import checkpoints
from parity.training.args import JobArgs, parse_job_args
from parity.tuning import embedded
from parity.tuning.args import parse_tune_args
from parity.tuning.records import read_records

SHAPE = ("--n-layer", 1, "--n-embd", 16, "--n-head", 2, "--n-ctx", 96)
OPTIONS = (
    *SHAPE, "--data", "data.jsonl", "--preset", "rules", "--steps", 6, "--eval-every", 3, "--batch-size", 4,
    "--accumulate", 2, "--eval-items", 3, "--sample-tokens", 4, "--drop-rate", 0.1, "--validation-fraction", 0.2,
)  # fmt: skip


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A folder with data.jsonl: 30 instructions of equal length, for which JAX compiles one program."""
    folder = tmp_path_factory.mktemp("tuning")
    lines = [record for record in embedded.instructions() if record["instruction"] == "Even or odd?"][:30]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    return folder


def tune(workplace, *arguments, moment=None):
    words = command("finetune.py", *arguments) if moment is None else interrupted(*moment, "finetune.py", *arguments)
    return run_program(words, cwd=workplace)


@pytest.fixture(scope="module")
def runs(workplace):
    """{backend: (folder, output)} of six steps with dropout."""
    finished = {}
    for name in BACKENDS:
        result = tune(workplace, "--backend", name, *OPTIONS, "--run", name)
        assert result.returncode == 0, result.stderr
        finished[name] = workplace / name, result.stdout
    return finished


@pytest.mark.parametrize("name", BACKENDS)
def test_a_run_leaves_its_folder(runs, name):
    folder, output = runs[name]
    assert {p.name for p in folder.iterdir()} >= {"config.json", "env.json", "metrics.jsonl", "loss.png", "samples.txt"}
    config = json.loads((folder / "config.json").read_text())
    assert config["tune"]["task"] == "instruct"
    assert config["train"]["corpus"] == "data.jsonl"
    evaluations = [entry for entry in metrics(folder) if "validation_loss" in entry]
    assert [entry["step"] for entry in evaluations] == [0, 3, 6]
    assert all(0 <= entry["exact_match"] <= 1 and 0 <= entry["ended"] <= 1 for entry in evaluations)
    assert (folder / "samples.txt").read_text(encoding="utf-8").count("### Response:") == 9
    assert "21 examples (0 cut, 0 dropped), 6 for validation (0 cut, 0 dropped), 3 for tests" in output
    assert "exact match 0.000  ended" in output
    assert "bigram" not in output


def test_both_backends_begin_alike(runs):
    first = [metrics(folder)[0]["validation_loss"] for folder, _ in runs.values()]
    assert first[0] == pytest.approx(first[1], rel=1e-6)


@pytest.mark.parametrize("name", ["torch", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_run_that_was_killed_or_stopped_is_resumed_exactly(runs, workplace, name):
    """Killed at the fifth step, resumed, stopped at the sixth, and resumed again."""
    run = f"resumed-{name}"
    kill = (signal.SIGKILL, "parity.training.loop:learning_rate:5")
    killed = tune(workplace, "--backend", name, *OPTIONS, "--run", run, moment=kill)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    stop = (signal.SIGTERM, "parity.training.loop:learning_rate:2")
    stopped = tune(workplace, "--backend", name, "--run", run, "--resume", moment=stop)
    assert stopped.returncode == 128 + signal.SIGTERM, stopped.stderr
    assert "resuming   after step 3" in stopped.stdout
    resumed = tune(workplace, "--backend", name, "--run", run, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert metrics(workplace / run) == metrics(runs[name][0])
    assert (workplace / run / "samples.txt").read_bytes() == (runs[name][0] / "samples.txt").read_bytes()


def test_a_run_of_the_other_backend_is_resumed(workplace):
    """In float64 and without dropout, a run that JAX begins and torch ends has the losses of a run in torch."""
    exact = (*OPTIONS, "--drop-rate", 0, "--dtype", "float64")
    whole = tune(workplace, "--backend", "torch", *exact, "--run", "exact")
    assert whole.returncode == 0, whole.stderr
    kill = (signal.SIGKILL, "parity.training.loop:learning_rate:5")
    tune(workplace, "--backend", "jax", *exact, "--run", "exact-mixed", moment=kill)
    assert checkpoints.steps(workplace / "exact-mixed" / "checkpoints") == [0, 3]
    resumed = tune(workplace, "--backend", "torch", "--run", "exact-mixed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for a, b in zip(metrics(workplace / "exact-mixed"), metrics(workplace / "exact"), strict=True):
        assert a == pytest.approx(b, rel=1e-9)


def test_packed_examples_in_both_backends(workplace):
    """In float64 and without dropout the losses are equal, and the first is that of examples in rows of their own."""
    options = (*OPTIONS, "--steps", 2, "--eval-every", 1, "--drop-rate", 0, "--dtype", "float64", "--max-length", 90)
    runs = {"torch": ("--packing", "--batch-size", 2), "jax": ("--packing", "--batch-size", 2), "padded": ()}
    results = {}
    for run, packing in runs.items():
        backend = "torch" if run == "padded" else run
        result = tune(workplace, "--backend", backend, *options, *packing, "--run", f"packed-{run}")
        assert result.returncode == 0, result.stderr
        results[run] = metrics(workplace / f"packed-{run}")
    for a, b in zip(results["jax"], results["torch"], strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    assert results["torch"][0] == pytest.approx(results["padded"][0], rel=1e-9)


@pytest.mark.slow
def test_processes_and_devices_make_the_same_steps(workplace):
    """In float64: one process, two processes of JAX, a mesh of two devices, and two processes of torchrun."""
    options = (*OPTIONS, "--drop-rate", 0, "--dtype", "float64")
    torchrun = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    join = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", 2, "--process-id")
    started = {
        "alone": [((), {})],
        "processes": [((*join, index), {}) for index in range(2)],
        "mesh": [(("--mesh", "data=2"), {"JAX_NUM_CPU_DEVICES": "2"})],
        "torchrun": [(("--backend", "torch"), {**torchrun, "RANK": str(index)}) for index in range(2)],
    }
    for name, processes in started.items():
        run = ("--run", workplace / f"together-{name}", "--data", workplace / "data.jsonl")
        words = [(command("finetune.py", *options, *run, *more), environment) for more, environment in processes]
        for result in finish([spawn(word, **environment) for word, environment in words]):
            assert result[0] == 0, result
        for a, b in zip(metrics(workplace / f"together-{name}"), metrics(workplace / "together-alone"), strict=True):
            assert a == pytest.approx(b, rel=1e-9)


def test_adapters_in_either_backend(runs, workplace):
    """In float64, a run of adapters that JAX begins and torch ends has the losses of one in torch; its base stays."""
    lora = ("--lora-rank", 2, "--lora-targets", "q", "v", "mlp.in", "--dtype", "float64", "--drop-rate", 0)
    options = (*OPTIONS, "--init-from", "torch", "--lr", 0.02, *lora)
    whole = tune(workplace, "--backend", "torch", *options, "--run", "lora")
    assert whole.returncode == 0, whole.stderr
    assert "adapters   rank 2, " in whole.stdout
    kill = (signal.SIGKILL, "parity.training.loop:learning_rate:5")
    tune(workplace, "--backend", "jax", *options, "--run", "lora-mixed", moment=kill)
    resumed = tune(workplace, "--backend", "torch", "--run", "lora-mixed", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    for a, b in zip(metrics(workplace / "lora-mixed"), metrics(workplace / "lora"), strict=True):
        assert a == pytest.approx(b, rel=1e-9)
    losses = [entry["validation_loss"] for entry in metrics(workplace / "lora") if "validation_loss" in entry]
    before = [entry["validation_loss"] for entry in metrics(runs["torch"][0]) if "validation_loss" in entry]
    assert losses[0] == pytest.approx(before[-1], rel=1e-6)
    assert losses[-1] != pytest.approx(losses[0], rel=1e-4)
    files = {path.name for path in (workplace / "lora" / "checkpoints" / "000006").iterdir()}
    assert files >= {"adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors"}
    assert "model.safetensors" not in files
    (workplace / "one.json").write_text('[{"instruction": "Even or odd?", "input": "12"}]')
    answers = [
        tune(workplace, "--backend", name, "--run", "lora", "--predict", "one.json", "--out", f"lora-{name}.json")
        for name in BACKENDS
    ]
    assert [result.returncode for result in answers] == [0, 0], answers
    first, second = ((workplace / f"lora-{name}.json").read_text(encoding="utf-8") for name in BACKENDS)
    assert first == second


def test_sample_prompts_are_instructions(workplace):
    (workplace / "prompts.txt").write_text("Is it even or odd?\nEven or odd?\n", encoding="utf-8")
    short = (*OPTIONS, "--steps", 1, "--eval-prompts", "prompts.txt", "--backend", "torch", "--run", "prompts")
    assert tune(workplace, *short).returncode == 0
    samples = (workplace / "prompts" / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("### Instruction:\nEven or odd?\n\n### Response:\n") == 2


def in_process(monkeypatch, workplace, *arguments):
    """Run the script in this process, so that its InputError can be seen; it fails before it trains."""
    monkeypatch.chdir(workplace)
    monkeypatch.setattr("sys.argv", ["finetune.py", *map(str, arguments)])
    return finetune.main()


BAD = {
    "torch has no mesh": (("--backend", "torch", "--mesh", "data=2"), "--mesh is an option of JAX; .*torchrun"),
    "torch has no coordinator": (
        ("--backend", "torch", "--num-processes", 2),
        "--num-processes and --process-id are options of JAX; .*torchrun --nproc-per-node",
    ),
    "no weights": (
        ("--data", "data.jsonl"),
        "--preset instruct needs weights to start from",
    ),
    "unknown preset": (
        ("--preset", "books"),
        "unknown preset 'books'; choose one of rules, rules-classify, rules-prefer, instruct",
    ),
    "preset for training": (("--preset", "small"), "'small'; it is one of the training scripts; choose one of rules"),
    "no file": ((*SHAPE, "--preset", "rules", "--data", "none.json"), "none.json is not a file"),
    "no test": ((*OPTIONS, "--test-fraction", 0.001), "data.jsonl: of 30 examples none is left for --test-fraction"),
    "no training": ((*OPTIONS, "--test-fraction", 0.9, "--validation-fraction", 0.1), "none is left for training"),
    "too long": (
        (*OPTIONS, "--max-length", 50, "--overlong", "refuse"),
        "data.jsonl, line 1: .* more than 50;",
    ),
    "long instruction": (
        (*OPTIONS, "--n-ctx", 40),
        "data.jsonl, line 22: the instruction has .* context 40",
    ),
    "two options for one": (("--predict", "data.jsonl"), "needs --run, the run that answers; give all three"),
    "a checkpoint in training": (("--checkpoint", "best"), "--checkpoint is for --predict; a run is resumed from its"),
    "options of adapters": (("--lora-alpha", 8), "--lora-alpha is for adapters; give --lora-rank as well"),
    "resume without run": (("--resume",), "--resume continues the run in --run"),
    "adapters without weights": (("--lora-rank", 4), "--lora-rank: adapters need weights under them"),
    "rank 0": (("--lora-rank", 0), "the rank of an adapter must be an integer in 1"),
    "no examples": ((*OPTIONS, "--max-length", 20), "none of the 21 examples fits into 20 positions"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_options_are_one_clear_error(monkeypatch, workplace, name):
    arguments, message = BAD[name]
    with pytest.raises(InputError, match=message):
        in_process(monkeypatch, workplace, *arguments)


def test_runs_of_the_training_scripts_and_of_this_one_are_told_apart(runs, finished_runs, monkeypatch):
    trained, tuned = finished_runs["torch"][0], runs["torch"][0]
    with pytest.raises(InputError, match=r"is not a run of scripts/finetune\.py"):
        parse_tune_args(finetune.Args, None, ["--run", str(trained), "--resume"])
    with pytest.raises(InputError, match=r"is a run of scripts/finetune\.py; resume it with that script"):
        parse_job_args(JobArgs, None, ["--run", str(tuned), "--resume"])


def test_other_settings_are_refused_on_resume(runs, workplace):
    result = tune(workplace, "--backend", "torch", "--run", "torch", "--resume", "--loss-on", "all")
    assert result.returncode == 2
    assert "cannot be resumed with other values: tune.loss_on was 'response' and is now 'all'" in result.stderr


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--template", "alpaca"), "--template"),
        (("--data", "other.json"), "--data"),
        (("--lr", 1e-3, "--resume"), "--resume"),
        (("--mesh", "data=2"), "--mesh"),
        (("--init-from", "124M"), "--init-from"),
    ],
)
def test_answers_refuse_options_of_training(runs, workplace, monkeypatch, options, named):
    answer = ("--run", "torch", "--predict", "data.jsonl", "--out", "refused.json")
    with pytest.raises(InputError, match=f"{named} has no effect on --predict"):
        in_process(monkeypatch, workplace, *answer, *options)
    assert not (workplace / "refused.json").exists()


def test_answers_have_as_many_tokens_as_asked_for(runs, workplace, monkeypatch):
    """The run's own number is 4; the answer of a model that was hardly trained does not end by itself."""
    (workplace / "short.json").write_text('[{"instruction": "Even or odd?", "input": "12"}]')
    texts = []
    for length in ((), ("--sample-tokens", 9)):
        answer = ("--run", "torch", "--backend", "torch", "--predict", "short.json", "--out", "short-answers.json")
        assert in_process(monkeypatch, workplace, *answer, *length) == 0
        [record] = read_records(workplace / "short-answers.json")
        texts.append(record.fields["model_response"])
        assert not record.fields["ended"]
    assert texts[1].startswith(texts[0])
    assert len(texts[1]) > len(texts[0])


@pytest.mark.parametrize("name", BACKENDS)
def test_answers_to_a_file(runs, workplace, name):
    """Both backends give the same answers with a run of either; the losses are those of the responses."""
    source = [
        {"instruction": "Is 12 even or odd?", "input": "", "output": "even", "id": 7},
        {"instruction": "Is 13 even or odd?"},
    ]
    (workplace / "test.json").write_text(json.dumps(source))
    answers = {}
    for backend in BACKENDS:
        out = f"answers-{name}-{backend}.json"
        result = tune(workplace, "--backend", backend, "--run", name, "--predict", "test.json", "--out", out)
        assert result.returncode == 0, result.stderr
        assert "2 answers in" in result.stdout
        answers[backend] = [record.fields for record in read_records(workplace / out)]
    first, second = answers["torch"]
    assert first["id"] == 7
    assert first["exact_match"] == (first["model_response"] == "even")
    assert set(second) == {"instruction", "model_response", "ended"}
    losses = [entries[0].pop("loss") for entries in answers.values()]
    assert answers["torch"] == answers["jax"]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert 3 < losses[0] < 8
    assert np.isfinite(losses[0])
