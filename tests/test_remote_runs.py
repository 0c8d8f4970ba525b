"""A mirrored run is used by its address: to generate, evaluate, convert, compare and start from."""

import json
import shutil
import uuid

import numpy as np
import pytest
from support.mirrored_runs import add_step, make_run
from support.mirrored_runs import upload as mirror
from support.runs import run_script

import gpt_torch
from parity.comparison.implementation import read_weights
from parity.errors import InputError
from parity.loading import load_model_and_tokenizer
from parity.storage.remote import MissingError, RemoteError, open_remote
from parity.training import remote_runs
from parity.training.initial import initial_arrays, own_tokenizer, weights_folder
from parity.training.remote_runs import pull_checkpoint, runs_folder
from parity.training.runs import RunFolder, read_run


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPT_PARITY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GPT_PARITY_OFFLINE", raising=False)


@pytest.fixture
def run(finished_runs):
    return finished_runs["torch"][0]


@pytest.fixture(params=["memory", "file"])
def address(request, run, tmp_path):
    """A copy of the run, as --mirror makes it."""
    place = {"memory": f"memory://{uuid.uuid4().hex}", "file": f"file://{tmp_path}/bucket"}[request.param]
    return upload(run, f"{place}/NAME")


def upload(run, address):
    files = open_remote(address)
    for path in sorted(run.rglob("*")):
        if path.is_file() and path.name != ".lock":
            files.put(path, path.relative_to(run).as_posix())
    return address


def assert_equal_models(one, other):
    state = other.state_dict()
    assert all((value == state[name]).all() for name, value in one.state_dict().items())


@pytest.mark.parametrize("which", ["newest", "best", "20"])
def test_a_checkpoint_is_loaded_by_address(run, address, which):
    here, there = (load_model_and_tokenizer(gpt_torch, run=place, checkpoint=which) for place in (run, address))
    assert_equal_models(here[0], there[0])
    assert here[1].name == there[1].name
    assert (here[2].name, here[2].parent.name) == (there[2].name, there[2].parent.name)
    assert there[2].is_relative_to(runs_folder())
    assert [path.name for path in there[2].parent.iterdir()] == [there[2].name]  # no other checkpoint is fetched


def test_the_best_checkpoint_is_replaced_meanwhile(tmp_path, monkeypatch):
    """By the process that trains the run, between the metrics and the checkpoint."""
    run, address = make_run(tmp_path / "run", [10]), f"memory://{uuid.uuid4().hex}/NAME"
    mirror(run, address, 10, is_new=True)

    def pull_late(*arguments, original=remote_runs.pull):
        monkeypatch.setattr(remote_runs, "pull", original)
        add_step(run, 20, keep=1)
        mirror(run, address, 20)
        for name in open_remote(address).list("checkpoints/000010/"):
            open_remote(address).remove(name)
        return original(*arguments)

    monkeypatch.setattr(remote_runs, "pull", pull_late)
    assert pull_checkpoint(address, "best")[1].name == "000020"
    with pytest.raises(MissingError, match="has no step 10; it has 20"):
        pull_checkpoint(address, "10")


def test_what_is_in_the_cache_is_not_fetched_again(address, monkeypatch):
    _, first = pull_checkpoint(address)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()}
    _, second = pull_checkpoint(address)
    assert second == first
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*") if path.is_file()} == before


def test_weights_tokenizer_and_initial_weights(run, address):
    config, weights = read_weights(address)  # those of check_parity.py
    expected_config, expected = read_weights(str(run))
    assert config == expected_config
    assert all(np.array_equal(weights[name], expected[name]) for name in expected)
    assert weights_folder(address).name == RunFolder(run).newest_intact().name
    assert own_tokenizer(address) == own_tokenizer(run)
    settings = read_run(RunFolder(run)).settings
    one, other = (initial_arrays(config, settings, place).arrays["wte.weight"] for place in (address, run))
    assert np.array_equal(np.asarray(one), np.asarray(other))
    model, tokenizer, folder = load_model_and_tokenizer(gpt_torch, run=address)
    assert tokenizer.n_vocab == model.config.n_vocab
    assert folder.is_dir()


def test_a_damaged_checkpoint_is_not_used(address):
    files = open_remote(address)
    newest = max(name for name in files.list("checkpoints/") if name.endswith("model.safetensors"))
    files.write(newest, b"x" * files.size(newest))
    step = int(newest.split("/")[1])
    with pytest.warns(UserWarning, match="skipped"), pytest.raises(InputError, match=r"NAME/.*model.safetensors"):
        pull_checkpoint(address, str(step))
    with pytest.warns(UserWarning, match="skipped"):
        assert int(pull_checkpoint(address)[1].name) < step


def test_bad_addresses(address, monkeypatch):
    for which, message in (("7", "has no step 7; it has"), ("oldest", "--checkpoint oldest: give newest, best")):
        with pytest.raises(InputError, match=message):
            pull_checkpoint(address, which)
    with pytest.raises(InputError, match="memory://nothing"):
        load_model_and_tokenizer(gpt_torch, run="memory://nothing")
    with pytest.raises(RemoteError, match="begins with one of"):
        load_model_and_tokenizer(gpt_torch, model="unknown://x")
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    with pytest.raises(RemoteError, match="connections are forbidden"):
        weights_folder("s3://bucket/x")


@pytest.mark.slow
def test_the_scripts_take_an_address(run, tmp_path):
    address = upload(run, f"file://{tmp_path}/bucket/NAME")
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    outputs = {}
    for place in (run, address):
        generated = run_script("generate.py", "--run", place, "--backend", "torch", "--max-new-tokens", 5, "The ")
        assert generated.returncode == 0, generated.stderr
        out = tmp_path / f"out-{len(outputs)}"
        options = ("--protocol", "loss", "--corpus", text, "--backend", "torch", "--out", f"{out}-eval")
        evaluated = run_script("evaluate.py", "--run", place, *options)
        assert evaluated.returncode == 0, evaluated.stderr
        converted = run_script("convert.py", place, out)
        assert converted.returncode == 0, converted.stderr
        weights = (out / "model.safetensors").read_bytes()
        results = json.loads((tmp_path / f"{out}-eval" / "results.json").read_text())["results"]
        metrics = [model["metrics"] for result in results for model in result["models"]]
        assert metrics
        outputs[place] = (generated.stdout, metrics, weights)
        shutil.rmtree(out)
    assert outputs[run] == outputs[address]
    compared = run_script(
        "check_parity.py", f"torch:{address}", f"torch:{run}", "--sections", "activations", "--out", tmp_path / "report"
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
