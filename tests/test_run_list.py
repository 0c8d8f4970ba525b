"""scripts/runs.py lists runs in every state, damaged ones included; scripts/cache.py shows and deletes caches."""

import json
import os
import shutil

import pytest
from support.runs import run_script

from parity.config import PRESETS
from parity.training import checkpoints
from parity.training.run_config import run_config
from parity.training.runs import RunFolder
from parity.training.settings import recipe


def make_run(folder):
    """What a run of 60 steps leaves, but with small checkpoints."""
    run = RunFolder(folder)
    run.create(run_config("tiny", PRESETS["tiny"], recipe("tiny").settings, "0" * 64))
    run.write("env.json", {"backend": "torch"})

    def write(folder):
        (folder / "model.safetensors").write_bytes(bytes(1000))

    for step in range(61):
        if step:
            run.log({"step": step, "loss": 5 - step / 100})
        if step % 20 == 0:
            run.log({"step": step, "validation_loss": 5 - step / 50})
            checkpoints.save(
                run.checkpoints, step, lambda folder: (folder / "model.safetensors").write_bytes(bytes(1000)), 3
            )
    return folder


@pytest.fixture
def runs(tmp_path):
    """A folder of runs in every state."""
    source = make_run(tmp_path / "source")
    for name in ("finished", "stopped", "killed", "no manifest", "bad config", "bad metrics", "list", "nested"):
        shutil.copytree(source, tmp_path / "runs" / name)
    folder = tmp_path / "runs"
    for name, step in (("stopped", 40), ("killed", 50)):
        lines = (source / "metrics.jsonl").read_text().splitlines(keepends=True)
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        (folder / name / "metrics.jsonl").write_text("".join(kept) + '{"step": 5')  # a line cut by a crash
        shutil.rmtree(folder / name / "checkpoints" / "000060")
    (folder / "no manifest" / "checkpoints" / "000060" / "manifest.json").unlink()
    (folder / "bad config" / "config.json").write_bytes(b"\xff\x00")
    (folder / "bad metrics" / "metrics.jsonl").write_text('{"validation_loss": "low"}\n')
    (folder / "list" / "config.json").write_text("[]")
    (folder / "nested" / "config.json").write_text("[" * 100_000)
    (folder / "no run").mkdir()
    return folder


def listed(*arguments):
    result = run_script("runs.py", *arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_runs_in_every_state(runs, tmp_path):
    entries = {entry["name"]: entry for entry in listed(runs)}
    assert {name: entry["state"] for name, entry in entries.items()} == {
        "finished": "finished",
        "stopped": "stopped",
        "killed": "unfinished",
        **dict.fromkeys(("no manifest", "bad config", "bad metrics", "list", "nested"), "damaged"),
    }
    assert all(bool(entry["problem"]) == (entry["state"] == "damaged") for entry in entries.values())
    finished, source = entries["finished"], tmp_path / "source"
    assert (finished["best_loss"], finished["best_step"]) == (pytest.approx(3.8), 60)
    assert (finished["preset"], finished["backend"]) == ("tiny", "torch")
    assert (finished["steps"], finished["planned_steps"], entries["killed"]["steps"]) == (60, 60, 50)
    assert finished["size"] == sum(path.stat().st_size for path in source.rglob("*") if path.is_file())
    table = run_script("runs.py", runs)
    assert table.returncode == 0, table.stderr
    assert all(name in table.stdout for name in entries)
    assert "60 of 60" in table.stdout
    assert "Traceback" not in table.stderr


def test_order_and_given_folders(runs):
    assert [entry["name"] for entry in listed(runs, "--sort", "name")] == sorted(
        entry["name"] for entry in listed(runs)
    )
    for number, name in enumerate(("stopped", "finished")):
        for path in [*(runs / name).rglob("*"), runs / name]:
            os.utime(path, (1e9 + number, 1e9 + number))
    both = (runs / "stopped", runs / "finished")
    assert [entry["name"] for entry in listed(*both)] == ["finished", "stopped"]
    result = run_script("runs.py", runs / "none")
    assert result.returncode == 2
    assert "is not a folder" in result.stderr


def test_differing_settings(runs):
    config = json.loads((runs / "killed" / "config.json").read_text())
    config["train"]["lr"], config["model"]["n_layer"] = 0.5, 7
    (runs / "killed" / "config.json").write_text(json.dumps(config))
    both = (str(runs / "finished"), str(runs / "killed"))
    rows = listed(*both, "--compare")
    assert rows == {
        "model.n_layer": dict(zip(both, (3, 7), strict=True)),
        "train.lr": dict(zip(both, (0.003, 0.5), strict=True)),
    }
    assert "train.lr" in run_script("runs.py", *both, "--compare").stdout
    for bad, message in (
        (both[:1], "needs two or more runs"),
        ((*both, "--sort", "loss"), "--sort orders the list of runs"),
        ((both[0], runs / "list"), "config.json cannot be read"),
    ):
        result = run_script("runs.py", *bad, "--compare")
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_caches_are_shown_and_cleared(tmp_path):
    cache, compiled = tmp_path / "cache", tmp_path / "compiled"
    contents = ("models/124M/hparams.json", "vocab.bpe", "the-verdict.txt", "the-verdict.txt.lock", "mine.txt")
    contents += ("compiled/x86_64/program",)
    for path in (*(cache / name for name in contents), compiled / "program"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(1_000_000))
    environment = {**os.environ, "GPT_PARITY_CACHE": str(cache), "JAX_COMPILATION_CACHE_DIR": str(compiled)}

    def run(*arguments):
        return run_script("cache.py", *arguments, env=environment, input="")

    shown = run().stdout
    assert all(kind in shown for kind in ("models", "vocabulary", "corpora", "compiled"))
    assert "2.0 MB" in shown
    asked = run("--clear", "all")
    assert asked.returncode == 2
    assert "--yes" in asked.stderr
    assert (cache / "vocab.bpe").exists()
    assert "--yes is for --clear" in run("--yes").stderr
    assert run("--clear", "corpora", "--yes").returncode == 0
    assert sorted(path.name for path in cache.iterdir()) == ["compiled", "mine.txt", "models", "vocab.bpe"]
    assert run("--clear", "all", "--yes").returncode == 0
    assert [path.name for path in cache.iterdir()] == ["mine.txt"]
    assert not compiled.exists()
    assert run("--clear", "models", "--yes").returncode == 0
