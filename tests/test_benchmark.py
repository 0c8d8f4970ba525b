"""The machinery of the benchmark: separate processes, turns, ratios to the first peer, and the files it writes."""

import json
import multiprocessing
import os
import threading

import benchmark
import pytest
from measure import prompt_files
from measure.report import Measurement, write
from measure.scoring import WORKS, draw_pairs, jax_scores, torch_scores
from measure.timing import Peer, Spec, Timings, first_calls, interleave
from support.runs import run_script
from support.workloads import die, refuse, timed

from parity.config import GPTConfig
from parity.errors import InputError


def test_peers_take_turns_in_processes_of_their_own():
    specs = {"ours": Spec(timed, ([0.02],)), "theirs": Spec(timed, ([0.05],))}
    timings, reference = interleave(specs, 2, 3, Spec(timed, ([0.001],)))
    assert timings["ours"].seconds == pytest.approx([0.02] * 6)
    assert timings["theirs"].seconds == pytest.approx([0.05] * 6)
    assert reference.seconds == pytest.approx([0.001] * 20)
    assert len({of_peer.device for of_peer in (*timings.values(), reference)} | {str(os.getpid())}) == 4


def test_warm_up_is_not_counted_but_first_calls_can_be_measured():
    specs = {"peer": Spec(timed, ([1, 0.001],), {"DEVICE_NAME": "a device"})}
    timings, _ = interleave(specs, 1, 2)
    assert timings["peer"].seconds == pytest.approx([0.001] * 2)
    assert timings["peer"].peak == 4
    assert timings["peer"].device == "a device"
    assert first_calls(specs, 2)["peer"].seconds == pytest.approx([1, 1])


def test_a_peer_that_dies_is_named():
    with (
        Peer("the other peer", Spec(die)) as peer,
        pytest.raises(InputError, match="the process of the other peer died"),
    ):
        peer.time_calls(1)


def test_a_peer_that_cannot_start_leaves_no_process_and_no_thread():
    """Its pool would otherwise be taken down during the interpreter's exit, which can end in a traceback."""
    threads = set(threading.enumerate())
    with pytest.raises(InputError, match="no such device"):
        Peer("the other peer", Spec(refuse))
    assert not multiprocessing.active_children()
    assert set(threading.enumerate()) <= threads  # threads of earlier tests may end meanwhile


def test_a_peer_that_fails_is_left_out_with_its_reason():
    specs = {"ours": Spec(timed, ([0.001],)), "cannot start": Spec(refuse), "dies": Spec(die)}
    timings, _ = interleave(specs, 1, 2)
    assert list(timings) == list(specs)
    assert len(timings["ours"].seconds) == 2
    assert timings["cannot start"].failure == "InputError: no such device"
    assert "the process of dies died" in timings["dies"].failure
    measurement = Measurement("a title", "step", 100, "tokens", timings)
    assert measurement.rows[1] == ["cannot start", "failed: InputError: no such device", "", "", "", ""]
    assert measurement.to_json()["peers"]["dies"] == {"failure": timings["dies"].failure}
    with pytest.raises(InputError, match="no such device"):
        interleave({"ours": Spec(refuse), "another": Spec(timed, ([0.001],))}, 1, 1)


def test_report(tmp_path):
    peers = {"ours": Timings([0.1, 0.3, 0.2], 5_000_000, "cpu"), "theirs": Timings([0.5, 0.3], 0, "cpu")}
    measurement = Measurement("a title", "step", 100, "tokens", peers, ["a note"])
    assert measurement.rows == [
        ["ours", "200", "100 to 300", "500.0", "", "5"],
        ["theirs", "400", "300 to 500", "250.0", "2.00", ""],
    ]
    write(tmp_path, "the command", "a machine", [measurement])
    entries = json.loads((tmp_path / "results.json").read_text())
    assert entries["measurements"][0]["peers"]["theirs"]["ratio"] == 2
    text = (tmp_path / "results.md").read_text()
    assert "| theirs | 400 | 300 to 500 | 250.0 | 2.00 |  |" in text
    assert "a note" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("train", "--items", "8"), "--items is not for train; it is for evaluate"),
        (("generate", "--preset", "tiny"), "--preset is not for generate; it is for train, profile, run"),
        (("all", "--whole"), "--whole is not for all; it is for run"),
    ],
)
def test_options_of_other_benchmarks_are_refused(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["benchmark.py", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=message):
        benchmark.main()


def test_the_script_measures_a_small_model(tmp_path):
    options = ("--preset", "tiny", "--rounds", "1", "--calls", "2", "--peers", "eager")
    result = run_script("benchmark.py", "train", *options, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    [measurement] = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert list(measurement["peers"]) == ["gpt_jax", "gpt_torch, eager", "transformers, eager"]
    assert all(peer["median_s"] > 0 and peer["peak_bytes"] > 1e8 for peer in measurement["peers"].values())
    assert "6N + 12LDT" in measurement["notes"][0]
    result = run_script("benchmark.py", "train", "--peers", "nobody")
    assert result.returncode == 2
    assert "--peers: no peer contains nobody; the peers are gpt_jax; gpt_torch, eager" in result.stderr


def test_a_missing_gpu_is_an_error(tmp_path):
    result = run_script("benchmark.py", "train", "--preset", "tiny", "--gpu", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "sees only cpu devices here" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", WORKS)
def test_peers_of_evaluation_compute_the_same(name, monkeypatch):
    monkeypatch.setenv("MEASURE_ON", "cpu")
    config = GPTConfig(n_vocab=97, n_ctx=256, n_embd=8, n_head=2, n_layer=1)
    pairs = draw_pairs(config, name, 8)
    assert [context for context, _ in pairs[:4]] == [pairs[0][0]] * 4 or name != "HellaSwag"
    assert jax_scores(config, pairs).call() == pytest.approx(torch_scores(config, pairs, 0).call(), rel=1e-6)


@pytest.mark.slow
def test_the_script_measures_evaluation(tmp_path):
    options = ("--rounds", "1", "--items", "4", "--peers", "of 16")
    result = run_script("benchmark.py", "evaluate", *options, "--out", tmp_path / "out", timeout=500)
    assert result.returncode == 0, result.stderr
    for measurement in json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]:
        assert list(measurement["peers"]) == ["gpt_jax", "lm-eval, transformers, batches of 16"]
        assert all(peer["median_s"] > 0 and peer["peak_bytes"] > 1e8 for peer in measurement["peers"].values())
    result = run_script("benchmark.py", "evaluate", "--items", "6")
    assert result.returncode == 2
    assert "--items must be a multiple of 4" in result.stderr


@pytest.mark.slow
def test_the_script_measures_adapters(tmp_path):
    options = ("--preset", "tiny", "--rounds", "1", "--calls", "1", "--batch-size", "2")
    result = run_script("benchmark.py", "lora", *options, "--out", tmp_path / "out", timeout=500)
    assert result.returncode == 0, result.stderr
    [measurement] = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert list(measurement["peers"]) == ["gpt_jax", "gpt_torch", "peft, transformers"]
    assert all(peer["median_s"] > 0 for peer in measurement["peers"].values())


@pytest.mark.slow
def test_the_script_measures_batches_of_examples(tmp_path):
    options = ("--preset", "tiny", "--rounds", "1", "--calls", "1")
    result = run_script("benchmark.py", "batching", *options, "--out", tmp_path / "out", timeout=500)
    assert result.returncode == 0, result.stderr
    [measurement] = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert list(measurement["peers"]) == ["buckets", "padded to the longest", "packed into rows of 256"]


@pytest.mark.slow
def test_whole_processes_are_measured_with_and_without_a_cache(tmp_path):
    result = run_script("benchmark.py", "start", "--rounds", "1", "--out", tmp_path / "out", timeout=500)
    assert result.returncode == 0, result.stderr
    measurements = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert [measurement["title"].split()[0] for measurement in measurements] == ["train_jax.py", "generate.py"]
    for measurement in measurements:
        assert list(measurement["peers"]) == ["cold", "warm", "no cache"]


def test_a_file_of_prompts_is_continued_in_the_batches_it_is_compared_with(monkeypatch):
    monkeypatch.setenv("MEASURE_ON", "cpu")
    calls = []

    def generate(prompts, max_new_tokens, **options):
        calls.append((prompts, max_new_tokens, options["temperature"]))
        return [prompt + [1] * max_new_tokens for prompt in prompts]

    monkeypatch.setattr(prompt_files, "_generator", lambda *arguments: generate)
    prompts = [[number, 2, 3] for number in range(8)]
    for make in (prompt_files.batches, prompt_files.file):
        workload = make(GPTConfig(n_vocab=97, n_ctx=16, n_embd=8, n_head=2, n_layer=1), prompts, 2, 5, "float32")
        workload.call()
        workload.call()
    assert calls[:4] == calls[4:8] == calls[8:12] == calls[12:]
    assert calls[0] == (prompts[:2], 5, 0)
