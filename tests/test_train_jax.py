"""The main job: what its step computes, and the script as a user runs it."""

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import TINY, random_batch

import gpt_jax
from gpt_jax.train import Trainer, cast, loss_sum
from parity import checkpoints
from parity.compare import compare
from parity.errors import InputError
from parity.settings import recipe
from parity.weights import rows

SETTINGS = recipe("tiny").settings
ROOT = Path(__file__).parents[1]


def batches(A, B, seed=0):
    inputs, targets = random_batch(TINY, A * B, seed)
    targets[0, :9] = -1  # uneven counts
    return inputs.reshape(A, B, -1), targets.reshape(A, B, -1)


def state_arrays(trainer):
    return {name: np.asarray(array) for name, array in trainer._arrays().items()}


def test_micro_batches_equal_one_batch():
    inputs, targets = batches(1, 6)
    one, many = Trainer(TINY, SETTINGS), Trainer(TINY, SETTINGS)
    for step in range(3):
        a = one.train_step(inputs, targets, 1e-3, step)
        b = many.train_step(inputs.reshape(3, 2, -1), targets.reshape(3, 2, -1), 1e-3, step)
        assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=1e-6)
        assert float(a["grad_norm"]) == pytest.approx(float(b["grad_norm"]), rel=1e-5)


def test_decay_reaches_matrices_only():
    """With no gradient to speak of, a step is the decay alone: p - lr * wd * p."""
    settings = dataclasses.replace(SETTINGS, weight_decay=0.5, eps=1e6)
    trainer = Trainer(TINY, settings)
    before = {n: np.asarray(p.get_value()) for n, p in gpt_jax.pretrained.parameters(trainer.state.model).items()}
    trainer.train_step(*batches(1, 2), 0.1, 0)
    after = {n: np.asarray(p.get_value()) for n, p in gpt_jax.pretrained.parameters(trainer.state.model).items()}
    for row in rows(TINY):
        factor = 0.95 if row.decayed else 1.0
        result = compare(row.flax, after[row.flax], before[row.flax] * factor, 1e-6)
        assert result.ok, str(result)
        assert row.decayed == ("weight" in row.huggingface and "ln_" not in row.huggingface)


def test_clip_and_adam_by_hand():
    """One step from the gradient: clip to the norm, bias-corrected moments, decay, learning rate."""
    settings = dataclasses.replace(SETTINGS, clip=0.01)
    trainer = Trainer(TINY, settings)
    inputs, targets = batches(1, 2)
    model = gpt_jax.GPTModel(TINY, seed=settings.seed)
    gradient = jax.grad(gpt_jax.train.calc_loss)(model, inputs[0], targets[0])
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(gradient)))
    metrics = trainer.train_step(inputs, targets, 0.01, 0)
    assert float(metrics["grad_norm"]) == pytest.approx(norm, rel=1e-5)
    assert norm > settings.clip
    decayed = {row.flax for row in rows(TINY) if row.decayed}
    parts = (gpt_jax.pretrained.parameters(m) for m in (model, gradient, trainer.state.model))
    before, grads, after = ({n: np.asarray(p.get_value(), np.float64) for n, p in part.items()} for part in parts)
    for name, g in grads.items():
        g = g * settings.clip / norm
        update = g / (np.abs(g) + settings.eps) + (settings.weight_decay * before[name] if name in decayed else 0)
        # Updates, not parameters; where g is near rounding, its sign is not known.
        clear = np.abs(g) > 1e-3 * np.abs(g).max()
        result = compare(name, ((before[name] - after[name]) / 0.01)[clear], update[clear], 2e-4)
        assert result.ok, str(result)


def test_state_is_donated_and_no_batch_compiles_again():
    trainer = Trainer(TINY, SETTINGS)
    old = trainer.state.model
    trainer.train_step(*batches(1, 2), 1e-3, 0)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(old))
    for step in range(1, 4):
        trainer.train_step(*batches(1, 2, seed=step), 1e-3 * step, step)
    assert trainer._train_step._cache_size() == 1


def test_dropout_is_a_function_of_seed_and_step():
    config = dataclasses.replace(TINY, drop_rate=0.3)
    inputs, targets = batches(1, 2)
    losses = [
        float(Trainer(config, dataclasses.replace(SETTINGS, seed=0)).train_step(inputs, targets, 1e-3, step)["loss"])
        for step in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]
    trainer = Trainer(config, SETTINGS)
    assert float(trainer.loss_sum(inputs[0], targets[0])) == float(trainer.loss_sum(inputs[0], targets[0]))
    model = gpt_jax.GPTModel(config)
    dropped = np.asarray(gpt_jax.model.dropout(jnp.ones((200, 200)), 0.3, jax.random.key(0)))
    assert set(np.unique(dropped)) == {np.float32(0), np.float32(1 / 0.7)}
    assert dropped.mean() == pytest.approx(1, abs=0.02)
    keys = (model(inputs[0], jax.random.key(k)) for k in (1, 1, 2))
    a, b, c = map(np.asarray, keys)
    assert np.array_equal(a, b)
    assert not np.array_equal(a, c)


def test_bfloat16_keeps_float32_parameters():
    trainer = Trainer(TINY, dataclasses.replace(SETTINGS, dtype="bfloat16"))
    exact = Trainer(TINY, SETTINGS)
    for step in range(5):
        a, b = (t.train_step(*batches(1, 4, seed=step), 1e-3, step) for t in (trainer, exact))
    assert float(a["loss"]) != float(b["loss"])
    assert float(a["loss"]) == pytest.approx(float(b["loss"]), rel=5e-3)
    assert {leaf.dtype for leaf in jax.tree.leaves(trainer.state.model)} == {jnp.dtype("float32")}


def test_loss_leaves_out_padding():
    inputs, targets = (part[0] for part in batches(1, 2))
    model = gpt_jax.GPTModel(TINY)
    left_out = np.where(np.arange(24) < 12, targets, -1)
    half = float(loss_sum(model, inputs[:, :12], targets[:, :12]))
    assert float(loss_sum(model, inputs, left_out)) == pytest.approx(half, rel=1e-6)
    assert {leaf.dtype for leaf in jax.tree.leaves(cast(model, jnp.bfloat16))} == {jnp.dtype("bfloat16")}


def test_checkpoints_restore_every_bit_and_refuse_another_model(tmp_path):
    trainer = Trainer(TINY, SETTINGS)
    trainer.train_step(*batches(1, 2), 1e-3, 0)
    folder = checkpoints.save(tmp_path, 1, trainer.save, keep=2)
    saved = state_arrays(trainer)
    other = Trainer(TINY, dataclasses.replace(SETTINGS, seed=9))
    other.restore(folder)
    restored = state_arrays(other)
    assert restored.keys() == saved.keys()
    assert all(np.array_equal(restored[name], saved[name]) for name in saved)
    a, b = (t.train_step(*batches(1, 2, seed=1), 1e-3, 1) for t in (trainer, other))
    assert float(a["loss"]) == float(b["loss"])
    with pytest.raises(InputError, match="does not fit this run"):
        Trainer(dataclasses.replace(TINY, n_layer=2), SETTINGS).restore(folder)


def test_damaged_checkpoints_are_passed_over(tmp_path):
    def write(folder):
        (folder / "weights").write_bytes(b"0123456789")

    for step in (1, 2, 3, 4):
        checkpoints.save(tmp_path, step, write, keep=3)
    assert checkpoints.steps(tmp_path) == [2, 3, 4]
    (tmp_path / "000009").mkdir()
    (tmp_path / "000004" / "weights").write_bytes(b"0123456780")
    with pytest.warns(UserWarning, match="passed over"):
        assert checkpoints.newest_intact(tmp_path) == tmp_path / "000003"
    with pytest.raises(InputError, match="no intact checkpoint"):
        checkpoints.newest_intact(tmp_path / "none")

    def full_disk(folder):
        (folder / "weights").write_bytes(b"01")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        checkpoints.save(tmp_path, 3, full_disk, keep=3)
    assert (tmp_path / "000003" / "weights").read_bytes() == b"0123456789"
    assert not list(tmp_path.glob(".unfinished*"))


# The script


def run_script(name, *arguments, **options):
    command = [sys.executable, str(ROOT / "scripts" / name), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    result = run_script("train_jax.py", "--preset", "tiny", "--run", folder)
    assert result.returncode == 0, result.stderr
    return folder, result.stdout


def losses(folder, after=0):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [entry for entry in lines if entry["step"] > after]


def test_a_run_leaves_its_folder(finished_run):
    folder, output = finished_run
    assert {p.name for p in folder.iterdir()} == {
        "config.json",
        "metrics.jsonl",
        "loss.png",
        "samples.txt",
        "checkpoints",
    }
    assert json.loads((folder / "config.json").read_text())["model"]["n_embd"] == 20
    metrics = losses(folder)
    assert [e["step"] for e in metrics if "loss" in e] == list(range(1, 61))
    validation = [e["validation_loss"] for e in losses(folder, -1) if "validation_loss" in e]
    assert len(validation) == 4
    assert validation[-1] < validation[0] - 1
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert checkpoints.steps(folder / "checkpoints") == [20, 40, 60]
    assert (folder / "samples.txt").read_text(encoding="utf-8").count("--- step") == 4
    for text in ("device     cpu", "float32", "attention explicit", "bigram", "generate.py --run"):
        assert text in output


def test_both_backends_sample_the_same_text_from_a_run(finished_run):
    folder, _ = finished_run
    texts = []
    for backend in ("jax", "torch"):
        result = run_script("generate.py", "--run", folder, "--backend", backend, "--seed", "3", "The ")
        assert result.returncode == 0, result.stderr
        texts.append(result.stdout)
    assert texts[0] == texts[1]
    assert texts[0].startswith("The ")


def test_generate_reads_files_and_pipes_and_refuses_what_does_not_fit(finished_run, tmp_path):
    folder, _ = finished_run
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
        (("--run", folder, "--model", "124M", "x"), "either --run"),
        (("--model", tmp_path / "none", "x"), "no folder"),
        (("--run", folder, "--file", tmp_path / "none"), "none"),
        (("--run", folder, "--file", prompt, "x"), "not both"),
    ):
        result = run_script("generate.py", "--backend", "torch", *bad)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr
        assert not result.stdout


def test_compare_decoding_writes_its_report(finished_run, tmp_path):
    folder, _ = finished_run
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


def test_stopped_and_resumed_equals_uninterrupted(finished_run, tmp_path):
    folder, _ = finished_run
    part = tmp_path / "part"
    command = [sys.executable, str(ROOT / "scripts" / "train_jax.py"), "--preset", "tiny", "--run", str(part)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 200
        while time.monotonic() < deadline and not (part / "checkpoints" / "000020").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=100)
    finally:
        process.kill()
    assert process.returncode == 128 + signal.SIGINT, errors
    assert "stopped by SIGINT" in output
    done = checkpoints.steps(part / "checkpoints")[-1]
    assert 20 <= done < 60
    result = run_script("train_jax.py", "--run", part, "--resume")
    assert result.returncode == 0, result.stderr
    assert f"resuming   after step {done}" in result.stdout
    assert losses(part) == losses(folder)  # bit for bit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "98M"], "unknown preset"),
        (["--preset", "tiny", "--device", "gpu"], "--device gpu: jax"),
        (["--preset", "tiny", "--attention", "cudnn"], "needs a GPU"),
        (["--preset", "tiny", "--corpus", "nothing.txt"], "no file or folder"),
        (["--preset", "tiny", "--batch-size", "0"], "batch_size"),
        (["--preset", "124M"], "vocab.bpe"),
    ],
)
def test_script_errors_are_one_line(arguments, message, tmp_path):
    environment = {"GPT_PARITY_CACHE": str(tmp_path), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": ""}
    result = run_script("train_jax.py", *arguments, "--run", tmp_path / "run", env=environment)
    assert result.returncode == 2, result.stderr
    assert message in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "run").exists()


def test_resume_of_another_config_is_refused(finished_run):
    folder, _ = finished_run
    result = run_script("train_jax.py", "--run", folder, "--resume", "--lr", "0.5")
    assert result.returncode == 2
    assert "train.lr is 0.003 there, 0.5 here" in result.stderr
    result = run_script("train_jax.py", "--preset", "tiny", "--run", folder)
    assert "already holds a run" in result.stderr
