"""Devices and processes that share batches give the scores of one device."""

import json
import os
import sys

import numpy as np
import pytest
from support.models import BACKENDS, TINY, probing_weights
from support.processes import finish, free_port, spawn
from support.runs import ROOT
from support.scored_requests import draw_requests

import gpt_jax
import gpt_torch
from parity.evaluation.scorer import Scorer

PROGRAM = [sys.executable, ROOT / "tests" / "support" / "shared_scores.py"]
PATH = os.pathsep.join([str(ROOT), str(ROOT / "tests")])


def one_process(out):
    return [spawn([*PROGRAM, "jax", out, 4], PYTHONPATH=PATH, JAX_NUM_CPU_DEVICES="4")]


def two_processes(out):
    address = f"127.0.0.1:{free_port()}"
    return [
        spawn([*PROGRAM, "jax", out, 4, address, 2, index], PYTHONPATH=PATH, JAX_NUM_CPU_DEVICES="2")
        for index in range(2)
    ]


def torchrun(out):
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    return [spawn([*PROGRAM, "torch", out], PYTHONPATH=PATH, RANK=str(index), **where) for index in range(2)]


CASES = {
    "one process with four devices": (gpt_jax, one_process),
    "two processes with two devices each": (gpt_jax, two_processes),
    "two processes of torchrun": (gpt_torch, torchrun),
}


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.slow) if name.startswith("one") else name for name in CASES]
)
def test_scores_do_not_depend_on_the_devices(case, tmp_path):
    """In the same order, too, and in all processes."""
    package, start = CASES[case]
    model = BACKENDS["torch" if package is gpt_torch else "jax"].build(TINY, probing_weights(TINY, np.float32))
    started = start(tmp_path / "scores")
    expected = list(Scorer(package, model, batch_size=4).score(draw_requests(TINY), top=2))
    for result in finish(started):
        assert result[0] == 0, result
    for index in range(len(started)):
        scores = json.loads((tmp_path / f"scores.{index}").read_text())
        assert [number for number, *_ in scores] == [number for number, _ in expected]
        for (_, logprobs, is_greedy, margin, top_ids), (_, score) in zip(scores, expected, strict=True):
            if package is gpt_torch:  # each process computes whole batches
                np.testing.assert_array_equal(np.float32(logprobs), score.token_logprobs)
            # The products of a device have fewer rows, which may round in another order.
            np.testing.assert_allclose(logprobs, score.token_logprobs, atol=3e-6)
            assert (is_greedy, top_ids) == (score.is_greedy, score.top_ids.tolist())
            assert margin == pytest.approx(score.margin, abs=3e-6)
        print(max(np.abs(s[1] - e.token_logprobs).max() for s, (_, e) in zip(scores, expected, strict=True)))
