"""A run by several processes has the same losses; each reads its rows, the first one writes, and all end together."""

import dataclasses
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from rich.console import Console
from support.interrupting import interrupted
from support.processes import finish, free_port, spawn
from support.runs import ROOT, command, metrics

import gpt_jax.distributed
import gpt_jax.train
import gpt_torch.distributed
from parity.data.windows import Windows
from parity.errors import InputError
from parity.training import agreement, job, job_data, processes
from parity.training import loop as fit
from parity.training.args import JobArgs, parse_job_args
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.processes import ALONE, Processes, abort_with_message
from parity.training.runs import RunFolder
from parity.training.settings import recipe

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 60
OPTIONS = ("--preset", "tiny", "--steps", "8", "--eval-every", "4", "--sample-tokens", "4")
RTOL = {"float32": 1e-5, "float64": 1e-12}
# The beginning of programs that are one of two processes: arguments HOST:PORT INDEX ...
JOIN = """
import os, pathlib, signal, sys, time
import {package}.distributed as distributed
from parity.errors import exit_with_message
address, index = sys.argv[1], int(sys.argv[2])
"""
ROWS_AND_KILL = (
    JOIN.format(package="gpt_jax")
    + """
import json
import jax, numpy as np
from gpt_jax.sharding import MeshShape, make_mesh
from gpt_jax.train import Trainer
from parity.config import GPTConfig
from parity.training.settings import recipe
rows = []
with exit_with_message(), distributed.processes(False, address, 2, index) as these:
    config = GPTConfig(n_vocab=96, n_ctx=16, n_embd=64, n_head=8, n_layer=2)
    for shape in (4,), (1, 4), (2, 1, 2), (1, 2, 2), (1, 1, 4):
        trainer = Trainer(config, recipe("tiny").settings, mesh=make_mesh(MeshShape(*shape)))
        part = trainer.local_slice(8)
        inputs, _ = trainer.to_device(*[(np.arange(128, dtype=np.int32) % 96).reshape(1, 8, 16)[:, part]] * 2)
        shards = len({str(shard.index) for shard in inputs.addressable_shards})
        rows.append([part.start, part.stop, list(inputs.shape), shards])
        whole = trainer._gathered(trainer.model)
        assert all(len(leaf.devices()) == 1 for leaf in jax.tree.leaves(whole))
    for number in (0, 7, -7, 2**31 - 1, 2**31, 5_000_000_000, -5_000_000_000, 2**61):  # also times after 2038
        assert these.all_reduce_max(number + index) == number + 1
    pathlib.Path(sys.argv[3]).write_text(json.dumps(rows))  # Gloo writes to standard output
    these.barrier()
    if index == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    these.barrier()
"""
)
# Process int(sys.argv[3]) sends itself the signal sys.argv[4]; the other one waits for it.
SIGNALLED = (
    JOIN.format(package="gpt_jax")
    + """
distributed._HEARTBEAT_SECONDS = 5
with exit_with_message(), distributed.processes(False, address, 2, index) as these:
    these.barrier()
    if index == int(sys.argv[3]):
        os.kill(os.getpid(), int(sys.argv[4]))
    these.barrier()
"""
)
WAITING = JOIN + "with exit_with_message(), distributed.processes(*eval(sys.argv[3])): pass"


def start(count, *arguments, signalled=None, **environment):
    """Start `count` processes of train_jax.py.

    `signalled`: (index, signal, moment) of one that sends itself a signal.
    """
    these = ("--coordinator", f"127.0.0.1:{free_port()}", "--num-processes", count, "--process-id")
    started = []
    for index in range(count):
        options = ("train_jax.py", *arguments, *these, index)
        receives = signalled is not None and signalled[0] == index
        started.append(spawn(interrupted(*signalled[1:], *options) if receives else command(*options), **environment))
    return started


def start_pair(program, *arguments, **environment):
    """Start two processes of a program that takes HOST:PORT, its index, and further arguments."""
    address = f"127.0.0.1:{free_port()}"
    return [spawn([sys.executable, "-c", program, address, i, *arguments], **environment) for i in range(2)]


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


def parse(*arguments):
    return parse_job_args(JobArgs, None, list(map(str, arguments)))


def train(dtype, *arguments):
    """Train in this process with gpt_jax, as scripts/train_jax.py does."""
    console = Console(quiet=True)
    with jax.enable_x64(dtype == "float64"):
        loaded = load_job(parse(*arguments, "--dtype", dtype))
        trainer = gpt_jax.train.Trainer(loaded.config, loaded.settings, loaded.init_from)
        assert resume_and_train(trainer, start_run(loaded, "jax", {}, console), console) == 0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    file = tmp_path_factory.mktemp("corpus") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def alone(tmp_path_factory, corpus):
    """Return the folder of the run by one process, in a dtype."""
    folders = {}

    def run(dtype):
        if dtype not in folders:
            folders[dtype] = tmp_path_factory.mktemp("alone") / dtype
            train(dtype, *OPTIONS, "--corpus", corpus, "--run", folders[dtype])
        return folders[dtype]

    return run


def assert_same_losses(folder, expected_run, rtol, last=8):
    """Every step and every evaluation up to `last` occurs once, with the losses of the expected run."""
    for key in ("loss", "validation_loss"):
        losses, expected = ({e["step"]: e[key] for e in metrics(run) if key in e} for run in (folder, expected_run))
        expected = {step: loss for step, loss in expected.items() if step <= last}
        assert losses.keys() == expected.keys()
        assert len([e for e in metrics(folder) if key in e]) == len(losses) >= 2
        difference = max(abs(losses[step] / expected[step] - 1) for step in expected)
        print(f"{key}: relative difference up to {difference:.1e}")
        assert difference <= rtol, key


def test_processes_stop_together_and_another_number_resumes(alone, corpus, tmp_path):
    """SIGTERM reaches one of two processes, and both stop after the same step. Then one process resumes the run."""
    folder = tmp_path / "[a] b*?" / "run"  # what orbax would take for a pattern
    options = (*OPTIONS, "--corpus", corpus, "--log-every", "1", "--run", folder)
    done = finish(start(2, *options, "--dtype", "float64", signalled=(1, signal.SIGTERM, at_step(6))))
    assert [status for status, *_ in done] == [143, 143], done
    assert "stopped by SIGTERM after step 6" in done[0][1]
    # The first process reports what happens; the others' output is Gloo's own.
    assert "in 2 processes" in done[0][1]
    assert "loss" not in done[1][1]
    assert "process 1 of 2: waiting up to 300 s for 2 processes at 127.0.0.1:" in done[1][2]
    assert_same_losses(folder, alone("float64"), RTOL["float64"], last=6)
    samples = (folder / "samples.txt").read_text()
    assert re.findall("--- step (.*) ---", samples) == ["0", "4"]
    assert (folder / "checkpoints" / "000006" / "manifest.json").exists()
    train("float64", "--run", folder, "--resume")
    assert_same_losses(folder, alone("float64"), 1e-10)
    assert samples == (alone("float64") / "samples.txt").read_text().partition("--- step 8")[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("count", "dtype", "more"),
    [
        (2, "float32", {}),
        (4, "float64", {}),
        (2, "float64", {"mesh": "fsdp=2,tensor=2", "devices": "2"}),
        (4, "float32", {}),
        (4, "float64", {"mesh": "data=2,fsdp=2,tensor=2", "devices": "2"}),
    ],
    ids=str,
)
def test_jax_losses_do_not_depend_on_the_processes(count, dtype, more, alone, corpus, tmp_path):
    options = (*OPTIONS, "--corpus", corpus, "--dtype", dtype, "--run", tmp_path / "run")
    mesh = ("--mesh", more["mesh"]) if more else ()
    environment = {"JAX_NUM_CPU_DEVICES": more["devices"]} if more else {}
    done = finish(start(count, *options, *mesh, **environment))
    assert [status for status, *_ in done] == [0] * count, done
    assert_same_losses(tmp_path / "run", alone(dtype), RTOL[dtype])
    assert f"in {count} processes" in done[0][1]
    assert not any("loss" in output for _, output, _ in done[1:])
    assert (tmp_path / "run" / "samples.txt").read_text() == (alone(dtype) / "samples.txt").read_text()


@pytest.mark.parametrize("more", [(), pytest.param(("--accumulate", "2"), marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "float64"])
def test_torch_losses_do_not_depend_on_the_processes(dtype, more, alone, corpus, tmp_path):
    """DistributedDataParallel under torchrun, against the JAX run by one process."""
    result = torchrun(2, *OPTIONS, *more, "--corpus", corpus, "--dtype", dtype, "--run", tmp_path / "run")
    assert result.returncode == 0, result.stderr
    assert ", 2 processes" in result.stdout
    assert_same_losses(tmp_path / "run", alone(dtype), {"float32": 1e-5, "float64": 1e-10}[dtype])


@pytest.mark.slow
@pytest.mark.parametrize("by", ["jax", "torch"])
def test_more_processes_go_on_from_a_checkpoint(by, alone, corpus, tmp_path):
    options = (*OPTIONS, "--corpus", corpus, "--dtype", "float64", "--run", tmp_path / "run")
    shutil.copytree(alone("float64"), tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "000008")
    if by == "jax":
        done = finish(start(4, *options, "--resume"))
        assert [status for status, *_ in done] == [0] * 4, done
        output = done[0][1]
    else:
        result = torchrun(2, *options, "--resume")
        assert result.returncode == 0, result.stderr
        output = result.stdout
    assert "resuming   after step 4" in output
    assert_same_losses(tmp_path / "run", alone("float64"), 1e-10)


@pytest.mark.slow
def test_a_mirrored_run_of_processes_goes_on_in_processes_elsewhere(alone, corpus, tmp_path):
    """The first process uploads and fetches; the others wait for it."""
    mirror = tmp_path / "mirror"
    options = (*OPTIONS, "--corpus", corpus, "--dtype", "float64", "--mirror", f"file://{mirror}")
    done = finish(start(2, *options, "--run", tmp_path / "lost"))
    assert [status for status, *_ in done] == [0] * 2, done
    assert done[0][1].splitlines()[-1] == f"mirror     step 8 is safe at file://{mirror}"
    shutil.rmtree(tmp_path / "lost")
    shutil.rmtree(mirror / "checkpoints" / "000008")
    result = torchrun(2, *options, "--run", tmp_path / "run", "--resume")
    assert result.returncode == 0, result.stderr
    assert "resuming   after step 4" in result.stdout
    assert_same_losses(tmp_path / "run", alone("float64"), 1e-10)


# Processes that end


def assert_reports_a_lost_peer(result):
    status, _, errors = result
    assert status == 2, result
    last = errors.splitlines()[-1]
    assert re.match(r"error: process \d of 2 (lost another process|was aborted by a library)", last), errors
    assert "--resume" in last
    assert "Traceback" not in errors


def test_each_process_has_its_rows_and_a_killed_one_ends_the_other(tmp_path):
    """Two processes with two devices each: rows of a batch of eight, and the global array they make."""
    done = finish(start_pair(ROWS_AND_KILL, tmp_path / "rows", JAX_NUM_CPU_DEVICES="2"))
    reported = json.loads((tmp_path / "rows").read_text())
    first, second = ([[a, b, [1, 8, 16], n] for n in (2, 2, 1, 1)] for a, b in ((0, 4), (4, 8)))
    whole = [[0, 8, [1, 8, 16], 1]]
    assert reported in (first + whole, second + whole)
    assert done[1][0] == -signal.SIGKILL, done
    assert_reports_a_lost_peer(done[0])


def test_a_killed_coordinator_ends_the_other():
    """JAX's thread may notice it before ours, and abort the process."""
    done = finish(start_pair(SIGNALLED, "0", int(signal.SIGKILL)))
    assert done[0][0] == -signal.SIGKILL
    assert_reports_a_lost_peer(done[1])


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGABRT, signal.SIGSEGV])
def test_a_process_that_no_longer_answers_ends_the_other(victim, number):
    started = start_pair(SIGNALLED, victim, int(number))
    other = finish(started[1 - victim : 2 - victim])[0]
    started[victim].kill()
    finish(started[victim : victim + 1])
    assert_reports_a_lost_peer(other)


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_training_process_that_is_killed_ends_the_others(victim, corpus, tmp_path):
    options = ("--preset", "tiny", "--steps", "100000", "--corpus", corpus, "--run", tmp_path / "run")
    done = finish(start(2, *options, signalled=(victim, signal.SIGKILL, at_step(31))))
    assert done[victim][0] == -signal.SIGKILL
    assert_reports_a_lost_peer(done[1 - victim])
    assert (tmp_path / "run" / "checkpoints" / "000020" / "manifest.json").exists()


def test_an_abort_is_reported():
    program = """
import os
from parity.training.processes import Processes, abort_with_message
with abort_with_message(Processes(1, 3)):
    os.abort()
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 2
    assert result.stderr.startswith("error: process 1 of 3 was aborted by a library")
    with abort_with_message(ALONE):
        pass  # afterwards abort() is what it was before
    assert signal.getsignal(signal.SIGABRT) == signal.SIG_DFL


# Processes that wait for each other


def test_a_process_whose_partner_never_comes_ends_with_one_line():
    address = f"127.0.0.1:{free_port()}"
    torch = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    started = []
    with socket.create_server(("127.0.0.1", 0)) as other_program:
        held = f"127.0.0.1:{other_program.getsockname()[1]}"
        for at, index in ((address, 0), (f"127.0.0.1:{free_port()}", 1), (held, 1)):
            arguments = (at, index, repr((False, at, 2, index, 3)))
            started.append(spawn([sys.executable, "-c", WAITING.format(package="gpt_jax"), *arguments]))
        for index in (0, 1):
            arguments = ("-", index, "(3,)")
            environment = {**torch, "MASTER_PORT": str(free_port()), "RANK": str(index)}
            program = WAITING.format(package="gpt_torch")
            started.append(spawn([sys.executable, "-c", program, *arguments], **environment))
        done = finish(started)
    reasons = ["Start all", "nothing listens there", "a program listens there", "Start all", "nothing listens there"]
    for (status, _, errors), index, reason in zip(done, (0, 1, 1, 0, 1), reasons, strict=True):
        assert status == 2, errors
        announced, line = (text for text in errors.splitlines() if "process" in text)
        assert re.match(rf"process {index} of 2: waiting up to 3 s for 2 processes at 127\.0\.0\.1:\d+$", announced)
        assert line.startswith(f"error: process {index} of 2: not all of 2 processes came to 127.0.0.1:")
        assert reason in line
        assert "--join-timeout" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((False, "127.0.0.1:1"), "missing: --num-processes, --process-id"),
        ((True, None, None, 0), "give either --distributed"),
        ((False, "localhost", 2, 1), "--coordinator: 'localhost' is not an address HOST:PORT"),
        ((False, "localhost:ssh", 2, 1), "--coordinator: 'localhost:ssh' is not an address"),
        ((False, "[::1]:70000", 2, 1), "with a port between 1 and 65535"),
        ((False, "127.0.0.1:2000", 2, 2), "--process-id must be between 0 and 1, got 2"),
        ((False, "127.0.0.1:2000", 2, -1), "--process-id must be between 0 and 1, got -1"),
        ((False, "127.0.0.1:2000", 0, 0), "--num-processes must be between 1"),
    ],
    ids=str,
)
def test_incomplete_options_are_refused(options, message):
    with pytest.raises(InputError, match=re.escape(message)), gpt_jax.distributed.processes(*options):
        pass


def test_a_port_that_another_program_holds_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as other_program:
        address = f"127.0.0.1:{other_program.getsockname()[1]}"
        with (
            pytest.raises(InputError, match=f"process 0 cannot listen at {address}"),
            gpt_jax.distributed.processes(False, address, 2, 0),
        ):
            pass


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "2"}, "missing: MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "2", "WORLD_SIZE": "2"}, "RANK=2 and WORLD_SIZE=2 are not an index"),
        ({"RANK": "x", "WORLD_SIZE": "2"}, "RANK=x"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_PORT": "99999"}, "not an address HOST:PORT"),
    ],
    ids=str,
)
def test_variables_of_torchrun_that_are_wrong_are_refused(variables, message, monkeypatch):
    if len(variables) == 3 or message.startswith("RANK"):
        variables = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "2000", **variables}
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message), gpt_torch.distributed.processes():
        pass


def test_slurm_sets_index_and_count():
    """The variables that srun sets for two tasks on a node; JAX derives the coordinator's port from the job id.

    Without them --distributed is refused.
    """
    program = (
        JOIN.format(package="gpt_jax")
        + """
with exit_with_message(), distributed.processes(True) as these:
    sys.stderr.write(f"{these.index} of {these.count}")
"""
    )
    these = {"SLURM_NTASKS": "2", "SLURM_STEP_NODELIST": "localhost", "SLURM_STEP_NUM_NODES": "1"}
    these["SLURM_JOB_ID"] = str(free_port(61440, 65535) - 61440)
    run = [sys.executable, "-c", program, "-"]
    started = [spawn([*run, i], **these, SLURM_PROCID=str(i), SLURM_LOCALID=str(i)) for i in range(2)]
    *done, refused = finish([*started, spawn([*run, 0])])
    assert [status for status, *_ in done] == [0, 0], done
    assert [errors[-6:] for *_, errors in done] == ["0 of 2", "1 of 2"]
    assert refused[0] == 2
    assert "the processes of the run do not find each other" in refused[2]
    assert "Traceback" not in refused[2]


# Processes that do not belong together


class Threads:
    """Threads of this process that take part in collective operations, as the processes of a run do."""

    def __init__(self, count):
        self.count, self.barrier, self.numbers = count, threading.Barrier(count), [0] * count

    def member(self, index):
        def all_reduce_max(number):
            self.numbers[index] = number
            self.barrier.wait(20)
            largest = max(self.numbers)
            self.barrier.wait(20)
            return largest

        return Processes(index, self.count, all_reduce_max)

    def run(self, function):
        """Return what function(processes) returns or raises in each thread."""
        results = [None] * self.count

        def call(index):
            try:
                results[index] = function(self.member(index))
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=call, args=(index,)) for index in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def test_agreeing():
    def agree(these):
        return [these.agree_on("same"), these.agree_on(f"{these.index}"), these.agree_on(f"{these.index // 2}")]

    assert Threads(3).run(agree) == [[True, False, False]] * 3
    facts = [{"a": "1", "b": "2"}, {"a": "1", "b": "3"}, {"a": "1", "b": "2"}]
    assert Threads(3).run(lambda these: these.differences(facts[these.index])) == [["b"]] * 3
    assert Threads(2).run(lambda these: these.differences({f"{these.index}": ""})) == [["code or libraries"]] * 2
    assert ALONE.agree_on("x")
    assert ALONE.differences(facts[0]) == []


def test_the_others_wait_in_turns_for_what_the_first_one_does(monkeypatch):
    monkeypatch.setattr(processes, "TURN_SECONDS", 0.01)
    waited = threading.Event()
    turns = [0, 0]

    def counting(these):
        def all_reduce_max(number):
            turns[these.index] += 1
            if turns[1] > 5:
                waited.set()
            return these.all_reduce_max(number)

        return dataclasses.replace(these, all_reduce_max=all_reduce_max)

    def act():
        assert waited.wait(60)
        return "done"

    assert Threads(2).run(lambda these: counting(these).first_does(act)) == ["done", None]

    def fail():
        raise InputError("the bucket is gone")

    first, second = Threads(2).run(lambda these: these.first_does(fail))
    assert (str(first), second) == ("the bucket is gone", None)


def load_differently(monkeypatch, change, *arguments, other=()):
    """Load a job in two threads; `change()` happens before the second one reads its data."""
    loaded, current = threading.Event(), threading.local()
    load_corpus, facts = job_data.load_corpus, job._facts
    parsed = [parse(*arguments), parse(*arguments, *other)]

    def load_in_turn(*options):
        if current.index == 1:
            assert loaded.wait(20)
            change()
        return load_corpus(*options)

    def facts_in_turn(a_job):
        result = facts(a_job)
        if current.index == 0:
            loaded.set()
        return result

    def load(these):
        current.index = these.index
        return load_job(parsed[these.index], these)

    with monkeypatch.context() as patch:
        patch.setattr(job_data, "load_corpus", load_in_turn)
        patch.setattr(job, "_facts", facts_in_turn)
        return Threads(2).run(load)


def tokens(*ids):
    return np.array(ids, "<u2").tobytes()


@pytest.fixture
def bins(tmp_path):
    folder = tmp_path / "bins"
    folder.mkdir()
    (folder / "train.bin").write_bytes(tokens(*range(250)))
    (folder / "val.bin").write_bytes(tokens(*range(100)))
    return folder


def replace(file, content):
    file.unlink()  # so that a memory map of the former file keeps its content
    file.write_bytes(content)


CHANGES = {
    "tokens in the corpus": lambda bins, patch: replace(bins / "val.bin", tokens(*range(99), 5)),
    "code of gpt-parity": lambda bins, patch: patch.setattr(agreement, "code_sha256", lambda: "other"),
    "versions of numpy": lambda bins, patch: patch.setattr(agreement, "library_versions", lambda: {"numpy": "1"}),
    "versions of Python": lambda bins, patch: patch.setattr(agreement.platform, "python_version", lambda: "3.9"),
    "training scripts": lambda bins, patch: patch.setattr(sys.modules["__main__"], "__file__", __file__, raising=False),
}


@pytest.mark.parametrize("name", CHANGES)
def test_processes_with_other_code_or_data_are_refused(name, bins, tmp_path, monkeypatch):
    if name == "versions of numpy":
        monkeypatch.setattr(agreement, "library_versions", lambda: {"numpy": "2"})
    errors = load_differently(
        monkeypatch,
        lambda: CHANGES[name](bins, monkeypatch),
        *("--preset", "tiny", "--corpus", bins, "--run", tmp_path / "run"),
    )
    for error in errors:
        assert isinstance(error, InputError), errors
        assert f"the processes of this run have different {name};" in str(error)
    assert not (tmp_path / "run").exists()


def test_processes_with_other_options_are_refused(bins, tmp_path, monkeypatch):
    options = ("--preset", "tiny", "--corpus", bins, "--run", tmp_path / "run")
    for other in (("--lr", 1e-5), ("--seed", 3), ("--run", tmp_path / "b")):
        for error in load_differently(monkeypatch, lambda: None, *options, other=other):
            assert "the processes of this run have different options" in str(error)
    jobs = load_differently(monkeypatch, lambda: None, *options, other=("--tensorboard",))
    assert [type(loaded) for loaded in jobs] == [job.Job] * 2


@pytest.mark.parametrize("where", ["run", "weights"])
def test_processes_that_see_other_files_are_refused(where, bins, tmp_path, monkeypatch):
    """Folders of the same name on the disks of two hosts."""
    import gpt_torch

    weights, run = tmp_path / "weights", tmp_path / "run"
    gpt_torch.save_pretrained(gpt_torch.GPTModel(dataclasses.replace(recipe("tiny").model, n_vocab=257)), weights)
    options = ("--init-from", weights, "--preset", "tiny", "--tokenizer", "bytes", "--corpus", bins, "--run", run)

    def change():
        if where == "run":
            (run / "checkpoints" / "000004").mkdir(parents=True)
        else:
            file = weights / "model.safetensors"
            data = bytearray(file.read_bytes())
            data[-2] ^= 1
            replace(file, data)

    name = {"run": "run folders", "weights": "weights in --init-from"}[where]
    for error in load_differently(monkeypatch, change, *options):
        assert f"have different {name};" in str(error)


def test_samples_of_large_arrays(tmp_path, monkeypatch):
    """Any change of a small array is noticed; of a large one both ends and most changes of some length."""
    small = np.arange(5000, dtype=np.uint16)
    assert agreement.sampled_sha256([small]) == agreement.sampled_sha256([small.copy()])
    monkeypatch.setattr(agreement, "_WHOLE_BYTES", 2**16)
    large = np.random.default_rng(0).integers(0, 50257, 4_000_000).astype("<u2")
    file = tmp_path / "large.bin"
    file.write_bytes(large.tobytes())
    mapped = np.memmap(file, np.uint16, mode="r")
    reference = agreement.sampled_sha256([mapped])
    assert agreement.sampled_sha256([large]) == reference
    for place in (0, len(large) - 1, slice(1_000_000, 1_004_000)):
        changed = large.copy()
        changed[place] += 1
        assert agreement.sampled_sha256([changed]) != reference
    shards = [small, small[:10]]
    for others in ([small], [small[:10], small], [small[:4990], np.append(small[4990:], small[:10])]):
        assert agreement.sampled_sha256(others) != agreement.sampled_sha256(shards)


def test_a_corpus_that_was_changed_in_place_is_not_resumed(bins, tmp_path):
    run = tmp_path / "run"
    console = Console(quiet=True)
    start_run(load_job(parse("--preset", "tiny", "--corpus", bins, "--run", run)), "jax", {}, console).run.unlock()
    before = (run / "config.json").read_bytes()
    moved = shutil.copytree(bins, tmp_path / "moved")
    start_run(load_job(parse("--run", run, "--resume", "--corpus", moved)), "jax", {}, console).run.unlock()
    for name, content in (("val.bin", tokens(*range(99), 5)), ("train.bin", tokens(7, *range(1, 250)))):
        folder = shutil.copytree(bins, tmp_path / name)
        replace(folder / name, content)
        with pytest.raises(InputError, match="the tokens of its corpus have changed"):
            start_run(load_job(parse("--run", run, "--resume", "--corpus", folder)), "jax", {}, console)
    # A run of an older version has no such record.
    config = json.loads(before)
    del config["corpus_samples"]
    (run / "config.json").write_text(json.dumps(config))
    start_run(load_job(parse("--run", run, "--resume", "--corpus", folder)), "jax", {}, console).run.unlock()


def test_versions_and_code_that_differ_at_resume_are_reported(bins, tmp_path, capsys):
    run = tmp_path / "run"
    console = Console(width=1000)
    start_run(load_job(parse("--preset", "tiny", "--corpus", bins, "--run", run)), "jax", {}, console).run.unlock()
    assert "changed" not in capsys.readouterr().out
    recorded = json.loads((run / "env.json").read_text())
    old = {
        **recorded,
        "code": "0" * 64,
        "python": "3.1",
        "versions": {**recorded["versions"], "numpy": "1.0", "x": "1"},
    }
    texts = (json.dumps(old), "[" * 50_000, "[]", '{"versions": 3, "code": []}', "")
    for text in texts:
        (run / "env.json").write_text(text)
        start_run(load_job(parse("--run", run, "--resume")), "jax", {}, console).run.unlock()
        printed = capsys.readouterr().out
        assert ("the code of gpt-parity has changed" in printed) == (text == texts[0])
        assert ("Python was 3.1 and is now 3." in printed) == (text == texts[0])
        assert ("numpy was 1.0 and is now 2." in printed) == (text == texts[0])
        assert ("x was 1 and is now not installed" in printed) == (text == texts[0])
        assert json.loads((run / "env.json").read_text())["code"] == agreement.code_sha256()


def test_torch_refuses_batches_that_cannot_be_divided(bins, tmp_path):
    import importlib.util

    spec = importlib.util.spec_from_file_location("train_torch", ROOT / "scripts" / "train_torch.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["train_torch"] = script
    spec.loader.exec_module(script)
    options = ("--preset", "tiny", "--batch-size", "3", "--corpus", str(bins), "--run", str(tmp_path / "run"))
    args = parse_job_args(script.Args, None, list(options))
    with pytest.raises(InputError, match="micro-batches of 3 windows are not divisible by 2 processes"):
        script.train(args, Processes(0, 2))
    assert not (tmp_path / "run").exists()


class Part:
    """A trainer that only takes its rows of the batches."""

    def __init__(self, index, count):
        self.index, self.count = index, count

    def local_slice(self, size):
        rows = size // self.count
        return slice(self.index * rows, (self.index + 1) * rows)

    def to_device(self, *batch):
        return batch

    def evaluate_batch(self, batch):
        _, targets = batch
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
