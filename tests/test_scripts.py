"""Scripts, run as a user runs them."""

import dataclasses
import json

import compare_decoding
import generate
import pytest
from support.models import BACKENDS
from support.runs import metrics, run_script

from parity.sampling import GenerateOptions
from parity.training import checkpoints


@pytest.mark.parametrize("name", BACKENDS)
def test_a_run_leaves_its_folder(finished_runs, name):
    folder, output = finished_runs[name]
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "config.json",
        "env.json",
        "metrics.jsonl",
        "loss.png",
        "samples.txt",
        "checkpoints",
    }
    assert json.loads((folder / "config.json").read_text())["model"]["n_embd"] == 20
    assert json.loads((folder / "env.json").read_text())["backend"] == name
    assert [e["step"] for e in metrics(folder) if "loss" in e] == list(range(1, 61))
    validation = [e["validation_loss"] for e in metrics(folder) if "validation_loss" in e]
    assert len(validation) == 4
    assert validation[-1] < validation[0] - 1
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoints.steps(folder / "checkpoints") == [20, 40, 60]
    assert (folder / "samples.txt").read_text(encoding="utf-8").count("--- step") == 4
    for text in ("device     cpu", "float32", "attention", "bigram", "generate.py --run"):
        assert text in output


def test_both_backends_sample_the_same_text_from_a_run(finished_runs):
    folder, _ = finished_runs["jax"]
    texts = []
    for backend in ("jax", "torch"):
        result = run_script("generate.py", "--run", folder, "--backend", backend, "--seed", "3", "The ")
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout)
    assert texts[0] == texts[1]
    options = ("--run", folder, "--backend", "torch", "--seed", "3", "The ")
    at = {step: run_script("generate.py", "--checkpoint", step, *options) for step in ("best", "60", "20")}
    assert at["best"].stdout == at["60"].stdout == texts[0] != at["20"].stdout
    assert texts[0].startswith("The ")


def test_generate_has_every_option_that_makes_sense_for_texts():
    """Those left out: eos_id, which the tokenizer gives, and first_row and per_prompt, which need several prompts."""
    fields = {field.name for field in dataclasses.fields(generate.Args)}
    assert GenerateOptions.__optional_keys__ - fields == {"eos_id", "first_row", "per_prompt"}


def test_generate_states_its_device_and_refuses_an_absent_one(finished_runs):
    folder, _ = finished_runs["jax"]
    for backend in BACKENDS:
        options = ("--run", folder, "--backend", backend, "--max-new-tokens", "3")
        result = run_script("generate.py", *options, "--device", "cpu", "x")
        assert result.returncode == 0, result.stderr
        assert result.stderr.startswith("[cpu (")
        assert f"{backend} " in result.stderr.splitlines()[0]
        result = run_script("generate.py", *options, "--device", "tpu", "x")
        assert result.returncode == 2
        assert "--device tpu" in result.stderr
        assert "Traceback" not in result.stderr


def test_generate_reads_files_and_pipes_and_refuses_what_does_not_fit(finished_runs, tmp_path):
    folder, _ = finished_runs["jax"]
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("In the beginning", encoding="utf-8")
    options = ("--run", folder, "--backend", "torch", "--max-new-tokens", "150", "--top-k", "20", "--top-p", "0.9")
    from_file = run_script("generate.py", *options, "--file", prompt)
    assert from_file.returncode == 0, from_file.stderr
    assert from_file.stdout.startswith("In the beginning")
    assert "tokens/s" in from_file.stderr
    from_pipe = run_script("generate.py", *options, input=prompt.read_text(encoding="utf-8"))
    assert from_pipe.stdout == from_file.stdout
    samples = run_script("generate.py", *options, "--file", prompt, "--samples", "2").stdout
    assert samples.count("=== sample") == 2
    for bad, message in (
        (("--run", folder, "--top-k", "999", "x"), "top_k must be in 1..257"),
        (("--run", folder, "--model", "124M", "x"), "(--run), or a size or a folder"),
        (("--model", tmp_path / "none", "x"), "not a folder"),
        (("--run", folder, "--checkpoint", "30", "x"), "no step 30; it has 20, 40, 60"),
        (("--run", folder, "--file", tmp_path / "none"), "none"),
        (("--run", folder, "--file", prompt, "x"), "not both"),
    ):
        result = run_script("generate.py", "--backend", "torch", *bad)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not result.stdout


def test_continuations_that_are_too_short_do_not_count():
    logprobs = [[-1.0], [-1.0] * 3, [-1.0] * 5]
    values = compare_decoding.measure([[7], [7, 7, 7], [1, 2, 1, 2, 1]], logprobs)
    assert values["distinct-1"] == pytest.approx((1 + 1 / 3 + 2 / 5) / 3)
    assert values["distinct-2"] == pytest.approx((1 / 2 + 2 / 4) / 2)
    assert values["repetition"] == 0  # the only two sequences of four tokens differ
    short = compare_decoding.measure([[7], [7, 7, 7]], logprobs[:2])
    assert short["repetition"] is None
    assert compare_decoding.show(short["repetition"]) == "n/a"


def test_compare_decoding_writes_its_report(finished_runs, tmp_path):
    folder, _ = finished_runs["jax"]
    out = tmp_path / "report"
    result = run_script(
        "compare_decoding.py", "--run", folder, "--backend", "torch", "--max-new-tokens", "40", "--out", out
    )
    assert result.returncode == 0, result.stderr
    figures = json.loads((out / "decoding.json").read_text())
    assert figures["greedy"]["mean log-probability"] > figures["temperature 1.3"]["mean log-probability"]
    assert figures["greedy"]["distinct-2"] < figures["temperature 1.3"]["distinct-2"]
    assert figures["greedy"]["repetition"] > figures["temperature 1.3"]["repetition"]
    assert (out / "decoding.png").read_bytes().startswith(b"\x89PNG")
    report = (out / "decoding.md").read_text(encoding="utf-8")
    assert all(f"| {name} |" in report for name in figures)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "98M"], "unknown preset"),
        (["--preset", "tiny", "--device", "gpu"], "--device gpu: jax"),
        (["--preset", "tiny", "--attention", "cudnn"], "needs a GPU"),
        (["--preset", "tiny", "--corpus", "nothing.txt"], "not a file or folder"),
        (["--preset", "tiny", "--batch-size", "0"], "batch_size"),
        (["--preset", "124M"], "vocab.bpe"),
        (["--preset", "tiny", "--init-from", "nothing"], "not a folder"),
        (["--preset", "tiny", "--eval-prompts", "nothing.txt"], "--eval-prompts nothing.txt cannot be read"),
        (["--preset", "tiny", "--n-ctx", "2"], "--sample-prompt: 'The ' has 4 tokens, the context is 2"),
    ],
)
def test_script_errors_are_one_line(arguments, message, tmp_path):
    environment = {"GPT_PARITY_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": ""}
    environment["GPT_PARITY_OFFLINE"] = "1"
    result = run_script("train_jax.py", *arguments, "--run", tmp_path / "run", env=environment)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_resume_of_another_config_is_refused(finished_runs):
    folder, _ = finished_runs["jax"]
    result = run_script("train_jax.py", "--run", folder, "--resume", "--lr", "0.5")
    assert result.returncode == 2
    assert "train.lr was 0.003 and is now 0.5" in result.stderr
    result = run_script("train_torch.py", "--preset", "tiny", "--run", folder)
    assert "already holds a run" in result.stderr


def test_fine_tuning_starts_from_weights_with_prompts_of_its_own(finished_runs, tmp_path):
    folder, _ = finished_runs["torch"]
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("The \n\nclass \n", encoding="utf-8")
    run = tmp_path / "run"
    options = (
        "--preset",
        "tiny",
        "--init-from",
        folder / "checkpoints" / "000060",
        "--steps",
        5,
        "--eval-prompts",
        prompts,
    )
    result = run_script("train_torch.py", *options, "--run", run, "--tensorboard")
    assert result.returncode == 0, result.stderr
    assert metrics(run)[0]["validation_loss"] == metrics(folder)[-1]["validation_loss"]
    samples = (run / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("--- step 5 ---\nThe ") == samples.count("--- step 5 ---\nclass ") == 1
    assert len(list((run / "tensorboard").glob("events.*"))) == 1


def test_a_loss_not_finite_stops_the_run_and_is_written_down(tmp_path):
    run = tmp_path / "run"
    options = ("--preset", "tiny", "--lr", "1e38", "--warmup", 0, "--run", run)
    result = run_script("train_torch.py", *options)
    assert result.returncode == 2, result.stdout
    assert "not finite; its batch is in" in result.stderr
    assert "--skip-nonfinite 1" in result.stderr
    assert "Traceback" not in result.stderr
    bad = metrics(run)[-1]
    assert "nonfinite" in bad
    written = json.loads((run / f"nonfinite-{bad['step']:06d}.json").read_text())
    assert len(written["windows"]) == len(written["inputs"]) == 8
    assert checkpoints.newest_intact(run / "checkpoints").name == "000000"
    again = run_script("train_torch.py", "--run", run, "--resume", "--skip-nonfinite", 1)
    assert again.returncode == 2  # the next one is one too many
    assert "changed    train.skip_nonfinite was 0 and is now 1" in again.stdout
    assert "skipped (1 of 1)" in again.stdout.replace("\n", " ")
    assert "--skip-nonfinite 2" in again.stderr
