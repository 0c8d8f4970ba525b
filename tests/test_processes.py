"""A run by several processes has the same losses; each reads its rows, the first one writes, and all end together."""

import contextlib
import dataclasses
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
from support.interrupting import interrupted
from support.runs import command, metrics, run_script

from parity.data.windows import Windows
from parity.training import loop as fit
from parity.training.processes import ALONE, Processes
from parity.training.runs import RunFolder
from parity.training.settings import recipe

OPTIONS = ("--preset", "tiny", "--steps", "20", "--eval-every", "10")
RTOL = {"float32": 1e-5, "float64": 1e-12}
PROGRAM = """
import json, pathlib, sys
import jax, numpy as np
from gpt_jax.distributed import processes
from gpt_jax.sharding import MeshShape, make_mesh
from gpt_jax.train import Trainer
from parity.config import GPTConfig
from parity.training.settings import recipe
rows = []
with processes(False, sys.argv[1], 2, int(sys.argv[2])):
    config = GPTConfig(n_vocab=96, n_ctx=16, n_embd=64, n_head=8, n_layer=2)
    for shape in (4,), (1, 4), (2, 1, 2), (1, 2, 2), (1, 1, 4):
        trainer = Trainer(config, recipe("tiny").settings, mesh=make_mesh(MeshShape(*shape)))
        part = trainer.local_slice(8)
        inputs, _ = trainer.to_device(*[(np.arange(128, dtype=np.int32) % 96).reshape(1, 8, 16)[:, part]] * 2)
        shards = len({str(shard.index) for shard in inputs.addressable_shards})
        rows.append([part.start, part.stop, list(inputs.shape), shards])
        whole = trainer._gathered(trainer.model)
        assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(whole))
    pathlib.Path(sys.argv[3]).write_text(json.dumps(rows))  # Gloo writes to standard output
"""


def free_port(first=16384, last=32767):
    """Return a port below the range of outgoing connections, one of which could otherwise take it in the meantime."""
    while True:
        port = random.randint(first, last)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def spawn(arguments, **environment):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(list(map(str, arguments)), **pipes, env={**os.environ, **environment})


def start(count, *arguments, each=None, signalled=None, **environment):
    """Start `count` processes of train_jax.py.

    `each`: further arguments of each. `signalled`: (index, signal, moment) of one that sends itself a signal.
    """
    these = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", count, "--process-id")
    started = []
    for index in range(count):
        options = ("train_jax.py", *arguments, *(each[index] if each else ()), *these, index)
        receives = signalled is not None and signalled[0] == index
        started.append(spawn(interrupted(*signalled[1:], *options) if receives else command(*options), **environment))
    return started


def finish(started, timeout=300):
    """[(exit status, output, errors)]; a process that hangs is killed, and fails the test."""
    ends = time.monotonic() + timeout
    try:
        outputs = [process.communicate(timeout=ends - time.monotonic()) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *output) for process, output in zip(started, outputs, strict=True)]


def at_step(number):
    """In the loop, before the step."""
    return f"parity.training.loop:learning_rate:{number}"


def torchrun(count, *arguments):
    """Run train_torch.py in `count` processes on this machine."""
    run = [sys.executable, "-m", "torch.distributed.run", "--master-port", str(free_port())]
    script = command("train_torch.py", *arguments)[1:]
    return subprocess.run(
        [*run, "--nproc-per-node", str(count), "--", *script], capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def alone(shared_run):
    """{dtype: folder of the run by one process}"""
    return {dtype: shared_run(f"alone-{dtype}", "train_jax.py", *OPTIONS, "--dtype", dtype)[0] for dtype in RTOL}


def assert_same_losses(folder, expected_run, rtol):
    """Every step and every evaluation occurs once, with the losses of the expected run."""
    for key, count in (("loss", 20), ("validation_loss", 3)):
        losses, expected = ({e["step"]: e[key] for e in metrics(run) if key in e} for run in (folder, expected_run))
        assert len([e for e in metrics(folder) if key in e]) == len(losses) == count
        difference = max(abs(losses[step] / expected[step] - 1) for step in expected)
        print(f"{key}: relative difference up to {difference:.1e}")
        assert difference <= rtol, key


@pytest.mark.parametrize(
    ("count", "dtype", "more"),
    [
        (2, "float32", {}),
        (4, "float64", {}),
        pytest.param(2, "float64", {"mesh": "fsdp=2,tensor=2", "devices": "2"}, marks=pytest.mark.slow),
        pytest.param(4, "float32", {}, marks=pytest.mark.slow),
        pytest.param(2, "float64", {}, marks=pytest.mark.slow),
        pytest.param(4, "float64", {"mesh": "data=2,fsdp=2,tensor=2", "devices": "2"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_jax_losses_do_not_depend_on_the_processes(count, dtype, more, alone, tmp_path):
    mesh = ("--mesh", more["mesh"]) if more else ()
    environment = {"JAX_NUM_CPU_DEVICES": more["devices"]} if more else {}
    done = finish(start(count, *OPTIONS, "--dtype", dtype, *mesh, "--run", tmp_path / "run", **environment))
    assert [status for status, *_ in done] == [0] * count, done
    assert_same_losses(tmp_path / "run", alone[dtype], RTOL[dtype])
    # The first process reports what happens; the others' output is Gloo's own.
    assert f"in {count} processes" in done[0][1]
    assert not any("loss" in output for _, output, _ in done[1:])
    samples = (tmp_path / "run" / "samples.txt").read_text()
    assert len(re.findall("--- step", samples)) == 3
    assert samples == (alone[dtype] / "samples.txt").read_text()


@pytest.mark.parametrize("more", [(), pytest.param(("--accumulate", "2"), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_torch_losses_do_not_depend_on_the_processes(dtype, more, alone, tmp_path):
    """DistributedDataParallel under torchrun, against the JAX run by one process."""
    result = torchrun(2, *OPTIONS, *more, "--dtype", dtype, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert ", 2 processes" in result.stdout
    assert_same_losses(tmp_path / "run", alone[dtype], {"float32": 1e-5, "float64": 1e-10}[dtype])


def test_a_stopped_run_is_resumed_by_another_number_of_processes(alone, tmp_path):
    """SIGTERM reaches one of two processes, and both stop after the same step. Then one process resumes the run."""
    options = (*OPTIONS, "--dtype", "float64", "--log-every", "1", "--run", tmp_path / "run")
    done = finish(start(2, *options, signalled=(1, signal.SIGTERM, at_step(5))))
    assert [status for status, *_ in done] == [143, 143], done
    assert "stopped by SIGTERM after step 5" in done[0][1]
    assert metrics(tmp_path / "run")[-1]["step"] == 5
    assert (tmp_path / "run" / "checkpoints" / "000005" / "manifest.json").exists()
    [(status, output, errors)] = finish(start(1, *options, "--resume"))
    assert status == 0, errors
    assert "resuming   after step 5" in output
    assert_same_losses(tmp_path / "run", alone["float64"], 1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("by", ["jax", "torch"])
def test_more_processes_go_on_from_a_checkpoint(by, alone, tmp_path):
    options = (*OPTIONS, "--dtype", "float64", "--run", tmp_path / "run")
    shutil.copytree(alone["float64"], tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000020")
    if by == "jax":
        done = finish(start(4, *options, "--resume"))
        assert [status for status, *_ in done] == [0] * 4, done
        output = done[0][1]
    else:
        result = torchrun(2, *options, "--resume")
        assert result.returncode == 0, result.stderr
        output = result.stdout
    assert "resuming   after step 10" in output
    assert_same_losses(tmp_path / "run", alone["float64"], 1e-10)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_process_ends_the_others(victim, tmp_path):
    options = ("--preset", "tiny", "--steps", "100000", "--run", tmp_path / "run")
    done = finish(start(2, *options, signalled=(victim, signal.SIGKILL, at_step(31))))
    assert done[victim][0] == -signal.SIGKILL
    status, _, errors = done[1 - victim]
    ours = f"error: process {1 - victim} of 2 lost another process"
    if victim == 0 and status == -signal.SIGABRT:  # the coordinator itself: JAX may be there before us
        assert "another task died" in errors
    else:
        assert status == 2
        assert ours in errors
        assert "--resume" in errors
        assert "Traceback" not in errors
    assert (tmp_path / "run" / "checkpoints" / "000020" / "manifest.json").exists()


def test_processes_that_do_not_belong_together_are_refused(tmp_path):
    rates = [("--lr", f"{index + 1}e-3") for index in range(2)]
    started = start(2, *OPTIONS, "--run", tmp_path / "run", each=rates)
    for status, _, errors in finish(started):
        assert status == 2
        assert "different options" in errors or "lost another process" in errors
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--coordinator", "127.0.0.1:1"), "missing: --num-processes, --process-id"),
        (("--distributed", "--process-id", "0"), "give either --distributed"),
        (("--distributed",), "the processes of the run do not find each other"),
    ],
    ids=str,
)
def test_incomplete_options_are_refused(options, message, tmp_path):
    result = run_script("train_jax.py", *OPTIONS, *options, "--run", tmp_path / "run")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_slurm_sets_index_and_count(tmp_path):
    """The variables that srun sets for two tasks on a node; JAX derives the coordinator's port from the job id."""
    these = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    these["SLURM_JOB_ID"] = str(free_port(61440, 65535) - 61440)
    options = ("--preset", "tiny", "--steps", "1", "--run", tmp_path / "run", "--distributed")
    started = [
        spawn(command("train_jax.py", *options), **these, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)
    ]
    done = finish(started)
    assert [status for status, *_ in done] == [0, 0], done
    assert "in 2 processes" in done[0][1]


def test_torch_refuses_batches_that_cannot_be_divided(tmp_path):
    result = torchrun(2, *OPTIONS, "--batch-size", "3", "--run", tmp_path / "run")
    assert result.returncode != 0
    assert "micro-batches of 3 windows are not divisible by 2 processes" in result.stderr


def test_each_process_has_its_rows(tmp_path):
    """Two processes with two devices each: rows of a batch of eight, and the global array they make."""
    address = f"127.0.0.1:{free_port()}"
    started = [
        spawn([sys.executable, "-c", PROGRAM, address, i, tmp_path / str(i)], JAX_NUM_CPU_DEVICES="2") for i in range(2)
    ]
    done = finish(started)
    assert [status for status, *_ in done] == [0, 0], done
    reported = [json.loads((tmp_path / str(i)).read_text()) for i in range(2)]
    assert reported[0] == [[0, 4, [1, 8, 16], n] for n in (2, 2, 1, 1)] + [[0, 8, [1, 8, 16], 1]]
    assert reported[1] == [[4, 8, [1, 8, 16], n] for n in (2, 2, 1, 1)] + [[0, 8, [1, 8, 16], 1]]


class Part:
    """A trainer that only takes its rows of the batches."""

    def __init__(self, index, count):
        self.index, self.count = index, count

    def local_slice(self, size):
        rows = size // self.count
        return slice(self.index * rows, (self.index + 1) * rows)

    def to_device(self, inputs, targets):
        return inputs, targets

    def evaluate_batch(self, inputs, targets):
        return float((targets >= 0).sum())


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_rows_of_all_processes_make_the_batch(count):
    settings = dataclasses.replace(recipe("tiny").settings, accumulate=2)
    windows = Windows([np.arange(1000) % 90, np.arange(77)], n_ctx=8, n_vocab=90)
    job = SimpleNamespace(settings=settings, train=windows, micro_size=4)
    every = [fit._batches(Part(index, count), job, settings.steps - 5) for index in range(count)]
    for step, parts in zip(range(settings.steps - 5, settings.steps), zip(*every, strict=True), strict=True):
        for which, whole in enumerate(windows.batch(settings.seed, step, settings.batch_size)):
            joined = np.concatenate([part[which] for part in parts], axis=1)  # [A, B, T]
            assert joined.shape == (2, 4, 8)
            assert np.array_equal(joined.reshape(whole.shape), whole)
    # Evaluation: every target once, whoever has it.
    assert sum(fit.evaluate(Part(index, count), windows, 8) for index in range(count)) == pytest.approx(1)


def test_followers_keep_in_memory_what_the_first_writes(tmp_path):
    first, other = RunFolder(tmp_path), RunFolder(tmp_path, writes=False)
    first.create({"a": 1})
    other.create({"a": 1})
    before = sorted(path.name for path in tmp_path.iterdir())
    for run in (other, first):
        run.log({"step": 1, "loss": 2.0})
        run.log({"step": 2, "validation_loss": 1.5})
        run.log({"step": 3, "validation_loss": 1.6})
        if run is other:
            other.add_samples(1, ["text"])
            other.write("x.json", {})
            other.plot(None)
            assert sorted(path.name for path in tmp_path.iterdir()) == before
        run.forget_after(2)
        assert run.metrics.best_step() == 2
    for run in (other, RunFolder(tmp_path, writes=False)):
        assert (run.metrics.evaluations, run.metrics.nonfinite) == (first.metrics.evaluations, first.metrics.nonfinite)


@pytest.mark.parametrize(("theirs", "agreed"), [("same", True), ("else", False)])
def test_agreeing(theirs, agreed):
    def largest(number):
        other = zlib.crc32(theirs.encode()) >> 1
        return max(number, other if number >= 0 else -other)

    assert Processes(0, 2, largest).agree_on("same") == agreed
    assert ALONE.agree_on(theirs)
