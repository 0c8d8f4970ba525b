"""The benchmark's parts of a step and of a run, and the peers nanoGPT and CTranslate2."""

import json
import re

import numpy as np
import pytest
from measure import ct2, nanogpt, operations, peers, whole_run
from measure.timing import Spec
from support.models import TINY
from support.runs import run_script
from support.workloads import parts

from parity.training.flops import flops_per_token
from parity.training.settings import recipe


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "text.txt"
    whole_run.write_text(file)
    return file


def test_the_text_is_like_tiny_shakespeare(text):
    characters = text.read_text(encoding="utf-8")
    assert characters.isascii()
    assert len(characters) == text.stat().st_size == 1_115_394
    assert len(set(characters)) == 65


def test_nanogpts_run_learns_evaluates_and_saves(text, tmp_path, monkeypatch):
    monkeypatch.setattr(nanogpt, "EVAL_BATCHES", 4)
    run = nanogpt.Run(text, tmp_path, threads=1)
    assert sum(p.numel() for p in run._model.parameters()) == 804_096
    before = run.evaluate()
    assert before == pytest.approx([np.log(65)] * 2, abs=0.1)
    seconds = run.slice(0, 12)
    assert seconds.keys() == {"steps", "evaluation", "save"}
    assert min(seconds.values()) > 0
    assert run.evaluate()[1] < before[1] - 0.05
    assert (tmp_path / "ckpt.pt").stat().st_size > 3 * 4 * 800_000


def test_a_run_is_composed_of_its_parts():
    """Slices take turns; the first one, which compiles, is not counted."""
    counts = {"step": 10, "evaluation": 2}
    unused = Spec(parts)
    contestants = {
        name: whole_run.Contestant(Spec(parts, (scale,)), unused, unused, counts, {"step": 1})
        for name, scale in (("ours", 1.0), ("theirs", 2.0))
    }
    measured, peaks = whole_run._measure_slices(contestants, 2)
    assert [slice["step"] for slice in measured["ours"]] == [2, 3]
    assert [slice["step"] for slice in measured["theirs"]] == [4, 6]
    assert peaks["ours"] == (5, "cpu")
    assert whole_run._total(counts, measured["ours"][0]) == 10 * 2 + 2 * 0.5
    described = whole_run._describe(counts, measured["ours"][0], start=4)
    assert described.startswith("25.0 s: start 4.0 s (16%), 10 x step 20.0 s (80%), 2 x evaluation 1.0 s (4%)")
    assert described.endswith("2000.0 ms per step")


def test_a_profile_covers_the_step():
    settings = recipe("tiny").settings
    profile = operations.step_profile(TINY, settings, 1, "none", 2).call()
    assert profile.seconds.keys() == {operations.STEP, *operations.KINDS}
    assert profile.seconds[operations.PRODUCTS] > 0
    assert profile.seconds["optimizer and clipping"] > 0
    assert profile.seconds["stacked arrays of the scan"] > 0
    expected = flops_per_token(TINY) * settings.batch_size * TINY.n_ctx
    assert profile.flops == pytest.approx(expected, rel=0.1)


def test_ctranslate2_decodes_as_transformers_does():
    import torch

    prompts = np.random.default_rng(0).integers(0, TINY.n_vocab - 1, (2, 4)).tolist()
    torch.manual_seed(0)
    ids = ct2.generation(TINY, prompts, 6, threads=1).call()
    torch.manual_seed(0)
    model = peers.transformers_model(TINY).eval()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    inputs = torch.tensor(prompts)
    expected = model.generate(inputs, attention_mask=torch.ones_like(inputs), **options)
    assert ids == expected[:, 4:].tolist()


@pytest.mark.slow
def test_the_parts_explain_a_run(tmp_path):
    result = run_script(
        "benchmark.py", "run", "--preset", "tiny", "--rounds", "2", "--whole", "--out", tmp_path / "out", timeout=500
    )
    assert result.returncode == 0, result.stderr
    composed, whole = json.loads((tmp_path / "out" / "results.json").read_text())["measurements"]
    assert list(composed["peers"]) == list(whole["peers"]) == ["gpt_jax", "gpt_jax, two devices"]
    seconds, of_whole = (measured["peers"]["gpt_jax"]["median_s"] for measured in (composed, whole))
    assert "60 x step" in composed["notes"][0]
    [share] = re.findall(r"its parts explain ([\d.]+)%", whole["notes"][0])
    assert float(share) == pytest.approx(100 * seconds / of_whole, abs=0.1)  # near 100 without other load
