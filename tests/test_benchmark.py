"""The benchmark's own machinery: peers apart, turns, ratios by the first, and what it leaves."""

import json
import multiprocessing
import os
import threading

import pytest
from measure.report import Measurement, write
from measure.turns import Figures, Peer, alternate, once
from support.runs import run_script
from support.workloads import deserter, first_slow, refuser, sleeper

from parity.errors import InputError


def test_peers_take_turns_in_processes_of_their_own():
    peers = {"ours": (sleeper, (0.02,), {}), "theirs": (sleeper, (0.05,), {})}
    found, meter = alternate(peers, 2, 3, (sleeper, (0.001,), {}))
    assert [len(figures.seconds) for figures in found.values()] == [6, 6]
    assert len(meter.seconds) == 20
    assert len({figures.device for figures in (*found.values(), meter)} | {str(os.getpid())}) == 4
    assert found["theirs"].median > 1.5 * found["ours"].median


def test_warming_up_does_not_count_but_the_first_call_can_be_had():
    peers = {"one": (first_slow, (), {"NAMED": "so"})}
    found, _ = alternate(peers, 1, 2)
    assert max(found["one"].seconds) < 0.2
    assert found["one"].peak == 4
    assert found["one"].device == "so"
    assert min(once(peers, 2)["one"].seconds) > 0.2


def test_a_peer_that_dies_is_named():
    with (
        Peer("the other one", (deserter, (), {})) as peer,
        pytest.raises(InputError, match="the other one: its process died"),
    ):
        peer.calls(1)


def test_a_peer_that_cannot_start_leaves_no_process_and_no_thread():
    """Its pool would otherwise be taken down during the interpreter's exit, which can end in a traceback."""
    threads = set(threading.enumerate())
    with pytest.raises(InputError, match="no such device"):
        Peer("the other one", (refuser, (), {}))
    assert not multiprocessing.active_children()
    assert set(threading.enumerate()) == threads


def test_report(tmp_path):
    peers = {"ours": Figures([0.1, 0.3, 0.2], 5_000_000, "cpu"), "theirs": Figures([0.5, 0.3], 0, "cpu")}
    measurement = Measurement("a title", "step", 100, "tokens", peers, ["a fact"])
    assert measurement.rows == [
        ["ours", "200", "100 to 300", "500.0", "", "5"],
        ["theirs", "400", "300 to 500", "250.0", "2.00", ""],
    ]
    write(tmp_path, "the command", "a machine", [measurement])
    entries = json.loads((tmp_path / "results.json").read_text())
    assert entries["measurements"][0]["peers"]["theirs"]["ratio"] == 2
    text = (tmp_path / "results.md").read_text()
    assert "| theirs | 400 | 300 to 500 | 250.0 | 2.00 |  |" in text
    assert "a fact" in text
    assert (tmp_path / "results.png").stat().st_size > 5000


def test_the_script_measures_a_small_model(tmp_path):
    options = ("--preset", "tiny", "--rounds", "1", "--calls", "2", "--peers", "eager")
    result = run_script("benchmark.py", "train", *options, "--out", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    [measurement] = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert list(measurement["peers"]) == ["gpt_jax", "gpt_torch, eager", "transformers, eager"]
    assert all(peer["median_s"] > 0 and peer["peak_bytes"] > 1e8 for peer in measurement["peers"].values())
    assert "6N + 12LDT" in measurement["facts"][0]
    result = run_script("benchmark.py", "train", "--peers", "nobody")
    assert result.returncode == 2
    assert "--peers: no nobody among gpt_jax; gpt_torch, eager" in result.stderr


def test_a_gpu_that_is_not_there_is_told(tmp_path):
    result = run_script("benchmark.py", "train", "--preset", "tiny", "--gpu", "--out", tmp_path / "out")
    assert result.returncode == 2
    assert "sees only cpu devices here" in result.stderr
    assert "Traceback" not in result.stderr
