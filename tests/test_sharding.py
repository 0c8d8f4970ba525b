"""A run over eight devices has the same losses on every mesh, and the expected memory and collectives."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from support.runs import ROOT, metrics, run_script
from support.sharded_runs import ALL, CONFIG, FEW, GENERATING, PARTS

from gpt_jax.sharding import MeshShape, bytes_per_device
from parity.comparison.compare import compare
from parity.config import PRESETS
from parity.errors import InputError

EIGHT = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
QUICKLY_COMPILED = {**EIGHT, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# Sums over devices are made in another order.
RTOL = {"float32": 2e-6, "float64": 1e-12}


@pytest.fixture(
    scope="module",
    params=[
        ("float32", "few"),
        pytest.param(("float32", "all"), marks=pytest.mark.slow),
        pytest.param(("float64", "all"), marks=pytest.mark.slow),
    ],
    ids=" ".join,
)
def runs(request, tmp_path_factory):
    """(dtype, shapes, results of sharded_runs.py)"""
    dtype, which = request.param
    program = str(ROOT / "tests" / "support" / "sharded_runs.py")
    out = tmp_path_factory.mktemp("sharded") / "facts.json"
    command = [sys.executable, program, dtype, which, str(out)]
    environment = QUICKLY_COMPILED if which == "few" else EIGHT
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stderr
    return dtype, {"few": FEW, "all": ALL}[which], json.loads(out.read_text())


def test_losses_do_not_depend_on_the_mesh(runs):
    dtype, shapes, results = runs
    expected = np.array(results["single"]["losses"])
    assert len(set(expected)) > 15
    for shape in map(str, shapes):
        assert results[shape]["losses"] == pytest.approx(expected, rel=RTOL[dtype]), shape


def test_the_loss_of_the_head_does_not_depend_on_the_mesh(runs):
    """Also where `tensor` does not divide the positions, or `fsdp` the width."""
    dtype, shapes, results = runs
    expected = [np.array(array) for array in results["head"]["None"]]
    shapes_of_arrays = [((), (8, 5, width), (CONFIG.n_vocab, width)) for width in (16, 15)]
    assert [array.shape for array in expected] == [shape for group in shapes_of_arrays for shape in group]
    for shape in map(str, shapes):
        for got, want in zip(results["head"][shape], expected, strict=True):
            bound = RTOL[dtype] * np.abs(want).max()
            assert compare(shape, np.array(got), want, bound).ok, shape


def test_a_part_of_a_model_trains_on_a_mesh_and_resumes(runs):
    dtype, shapes, results = runs
    assert results["parts"].keys() == (PARTS.keys() if shapes is ALL else {"adapters"})
    for part, by_shape in results["parts"].items():
        expected, _ = by_shape["None"]
        assert len(set(expected)) == 6
        for shape, (losses, resumed) in by_shape.items():
            assert losses == pytest.approx(expected, rel=RTOL[dtype]), (part, shape)
            assert resumed == losses[3:], (part, shape)


def test_a_checkpoint_is_resumed_on_another_mesh(runs):
    dtype, _, results = runs
    restored = [name for name in results if name.startswith("restored")]
    assert len(restored) == 3
    for name in restored:
        assert results[name]["losses"] == pytest.approx(results["single"]["losses"][10:], rel=RTOL[dtype]), name


def test_models_on_a_mesh_generate(runs):
    _, shapes, results = runs
    assert [len(row) for row in results["tokens"]] == [23, 21]
    assert results["same tokens"] == {str(shape): True for shape in (GENERATING if shapes is FEW else ALL)}


def test_each_device_holds_its_part(runs):
    """Parameters and two moments, and a count of four bytes."""
    dtype, shapes, results = runs
    for shape in shapes:
        facts = results[str(shape)]
        assert facts["devices"] == 8
        assert facts["bytes"] == [3 * bytes_per_device(CONFIG, MeshShape(*shape), np.dtype(dtype).itemsize) + 4]
    replicated, sharded = (bytes_per_device(PRESETS["1558M"], MeshShape(fsdp=size)) for size in (1, 8))
    assert 7.9 < replicated / sharded <= 8


def test_collectives_are_those_that_the_mesh_needs(runs):
    _, _, results = runs
    single, replicated, sharded, tensor = (
        results[name]["collectives"] for name in ("single", "(8, 1, 1)", "(1, 8, 1)", "(1, 1, 8)")
    )
    assert not any(single.values())
    # Replicas: gradients are summed, and nothing else is sent.
    assert replicated["all-reduce"] >= 1
    assert replicated["all-gather"] == replicated["reduce-scatter"] == replicated["all-to-all"] == 0
    # Sharded parameters are gathered where they are used. On a CPU, XLA all-reduces gradients before it shards them.
    assert sharded["all-gather"] >= 4
    assert sharded["all-reduce"] + sharded["reduce-scatter"] >= 1
    # Sharded heads and MLP: activations are summed after both, in the forward and the backward pass of the layer.
    assert tensor["all-reduce"] >= 4


def test_a_step_sends_what_is_planned_and_nothing_in_the_loop_over_chunks(runs):
    """Summed after each chunk, the head's gradient would be most of what a step sends."""
    _, shapes, results = runs
    if shapes is not FEW:
        pytest.skip("the program is the same as in the other runs")
    assert len(results["communication"]) == 3
    for shape, facts in results["communication"].items():
        assert 0.5 < facts["sent"] / facts["planned"] < 1.2, shape
        assert facts["chunk loops"] == [{"iterations": 4, "collectives": []}], shape


def test_what_cannot_be_sharded_evenly_is_refused():
    assert MeshShape.parse("tensor=2, data=4") == MeshShape(data=4, tensor=2)
    for bad in ("", "data", "data=0", "model=2", "data=2,data=2", "data=x"):
        with pytest.raises(InputError, match="write data=2,fsdp=2,tensor=2, each axis"):
            MeshShape.parse(bad)
    with pytest.raises(InputError, match="n_head=25 is not divisible by tensor=2"):
        MeshShape(tensor=2).check(PRESETS["1558M"], 8)
    with pytest.raises(InputError, match="n_embd=20 is not divisible by fsdp=8"):
        MeshShape(fsdp=8).check(PRESETS["tiny"], 8)
    with pytest.raises(InputError, match="micro-batches of 6 windows are not divisible by data x fsdp = 4"):
        MeshShape(data=2, fsdp=2).check(PRESETS["tiny"], 6)


def test_the_script_runs_over_a_mesh(finished_runs, tmp_path):
    options = ("--preset", "tiny", "--mesh", "data=2,fsdp=2,tensor=2", "--eval-every", 60)
    result = run_script("train_jax.py", *options, "--run", tmp_path / "run", env=QUICKLY_COMPILED)
    assert result.returncode == 0, result.stderr
    assert "8 of them: data=2,fsdp=2,tensor=2" in result.stdout
    # Early on, before rounding has grown: see test_resume.py.
    expected = [e["loss"] for e in metrics(finished_runs["jax"][0]) if "loss" in e][:20]
    assert [e["loss"] for e in metrics(tmp_path / "run") if "loss" in e][:20] == pytest.approx(expected, rel=1e-5)
    result = run_script("train_jax.py", "--preset", "tiny", "--mesh", "data=8", "--run", tmp_path / "few")
    assert result.returncode == 2
    assert "--mesh needs 8 devices; available: 1 (cpu). JAX_NUM_CPU_DEVICES=8 divides a CPU" in result.stderr
    assert not (tmp_path / "few").exists()
