"""scripts/test_gpu.py: parts that fail or hang, what the parts report, and (make test-slow) all of them on the CPU."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import test_gpu
from measure import gpu_parts
from measure.parts import Command, Outcome, Part, log_file, run_parts, write_results
from support.runs import ROOT, run_script

from parity.errors import InputError


def python(code):
    return Command(["-S", "-c", code])


def print_statuses(folder, statuses):
    return Outcome("passed" if statuses == [0] * len(statuses) else "failed", [f"statuses {statuses}"])


def test_every_part_reports_whatever_becomes_of_the_others(tmp_path):
    hanging = (
        "import subprocess, sys; subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(600)']).wait()"
    )
    parts = [
        Part("fails", 20, [[python("print('a reason'); raise SystemExit(3)")]], print_statuses),
        Part("hangs", 1, [[python("print('half')"), python(hanging)], [python("never")]], print_statuses),
        Part("writes nothing", 20, [[python("")]], lambda folder, _: (folder / "none").read_text()),
        Part("passes", 20, [[python("import parity.errors, measure; print(measure.__file__)")]], print_statuses),
    ]
    results = {result.name: result for result in run_parts(parts, tmp_path / "out", 300)}  # 7 s for what hangs
    assert list(results) == [part.name for part in parts]
    assert [result.outcome.status for result in results.values()] == ["failed", "timed out", "failed", "passed"]
    assert results["fails"].outcome.lines == ["statuses [3]", "a reason"]
    assert results["hangs"].outcome.lines[1] == "statuses [0, None, None]"
    assert results["writes nothing"].outcome.lines[0].startswith("nothing was written to ")
    assert str(ROOT) in log_file(tmp_path / "out" / "passes").read_text()  # nothing need be installed

    write_results(tmp_path, {"card": "H100 | 580", "machine": "m"}, list(results.values()))
    entries = json.loads((tmp_path / "results.json").read_text())
    assert entries["card"] == "H100 | 580"
    assert [part["status"] for part in entries["parts"]] == ["failed", "timed out", "failed", "passed"]
    text = (tmp_path / "results.md").read_text()
    assert text.startswith("# H100 | 580\n")
    assert "| fails | failed | 0 | statuses [3]<br>a reason |" in text


def test_time_that_a_part_saves_goes_to_the_later_ones(tmp_path, monkeypatch):
    limits = []
    monkeypatch.setattr("measure.parts.run_part", lambda part, folder, seconds: limits.append(seconds))
    list(run_parts([Part(name, share, [], None) for name, share in (("a", 1), ("b", 1), ("c", 2))], tmp_path, 100))
    assert limits == [pytest.approx(number, abs=1) for number in (25, 33.3, 100)]


def wait_for_text(file):
    """Return when a process that was started has written the file."""
    for _ in range(6000):
        if file.exists() and file.read_text():
            return
        time.sleep(0.05)
    pytest.fail(f"{file} is not written")


def wait_for_end(child):
    for _ in range(600):
        stat = Path(f"/proc/{child}/stat")
        if not stat.exists() or " Z " in stat.read_text():
            return
        time.sleep(0.1)
    os.kill(child, 9)
    pytest.fail("a process goes on")


def test_a_hanging_command_is_killed_with_the_processes_it_started(tmp_path, monkeypatch):
    """The deadline comes as soon as the process that it starts runs."""
    code = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {code!r}])"

    class Process(subprocess.Popen):
        def wait(self, timeout=None):
            if timeout is None:
                return super().wait()
            wait_for_text(tmp_path / "pid")
            raise subprocess.TimeoutExpired(self.args, timeout)

    monkeypatch.setattr(subprocess, "Popen", Process)
    [result] = run_parts([Part("hangs", 1, [[python(parent)]], print_statuses)], tmp_path, 300)
    assert result.outcome.status == "timed out"
    wait_for_end(int((tmp_path / "pid").read_text()))


def metrics(folder, losses):
    folder.mkdir(parents=True)
    lines = [{"step": 0, "validation_loss": 9.0}, *({"step": n, "loss": loss} for n, loss in enumerate(losses, 1))]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_losses_are_compared_step_by_step(tmp_path):
    metrics(tmp_path / "float64/jax", [4.0, 2.0])
    metrics(tmp_path / "float64/torch", [4.0, 2.0 + 1e-12])
    metrics(tmp_path / "float32/jax", [4.0, 2.0])
    metrics(tmp_path / "float32/torch", [4.0])
    outcome = gpu_parts._summarize_training(tmp_path, [0] * 4)
    assert outcome.status == "failed"
    assert [outcome.data[dtype]["status"] for dtype in ("float64", "float32")] == ["passed", "failed"]
    assert outcome.data["float64"]["largest_difference"] == pytest.approx(5e-13, rel=1e-3)
    assert outcome.data["float32"]["largest_difference"] == math.inf
    metrics(tmp_path / "none" / "float32/jax", [])
    metrics(tmp_path / "none" / "float32/torch", [4.0])
    outcome = gpu_parts._equal_losses(tmp_path / "none" / "float32")
    assert outcome.status == "failed"
    assert "last loss jax none, torch 4.000000" in outcome.lines[0]


@pytest.mark.parametrize(
    ("statuses", "losses", "status"),
    [
        ([-9, -9, 0, 0], [4.0, 2.0], "passed"),
        ([-9, -9, 0, 0], [4.0, 2.1], "failed"),
        ([0, -9, 0, 0], [4.0, 2.0], "failed"),  # it was not killed
        ([-9, -9, 2, 0], [4.0, 2.0], "failed"),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(statuses, losses, status, tmp_path):
    for backend in ("jax", "torch"):
        metrics(tmp_path / "training/float32" / backend, [4.0, 2.0])
        metrics(tmp_path / "kill-and-resume" / backend, losses if backend == "jax" else [4.0, 2.0])
    outcome = gpu_parts._summarize_resuming(tmp_path / "kill-and-resume", statuses)
    assert outcome.status == outcome.data["jax"]["status"] == status
    assert outcome.data["torch"]["status"] == "passed"
    assert outcome.lines[1].endswith("those of the uninterrupted run are bit-identical")


def test_resuming_is_compared_with_the_other_backend_if_there_is_no_uninterrupted_run(tmp_path):
    for backend in ("jax", "torch"):
        metrics(tmp_path / "kill-and-resume" / backend, [4.0, 2.0])
    outcome = gpu_parts._summarize_resuming(tmp_path / "kill-and-resume", [-9, -9, 0, 0])
    assert outcome.status == "passed"
    assert "those of torch's resumed run" in outcome.lines[0]


@pytest.mark.parametrize(("device", "status"), [("gpu", "failed"), ("cpu", "passed")])
def test_frameworks_that_see_no_gpu_fail_the_part_doctor(device, status, tmp_path):
    log_file(tmp_path).write_text("  jax's devices     cpu (cpu)\n  torch's devices   NVIDIA H100; cpu (8 threads)\n")
    outcome = gpu_parts._summarize_doctor(device, tmp_path, [0])
    assert outcome.status == status
    assert outcome.lines == (["jax sees no GPU"] if device == "gpu" else ["no problems found"])


def test_parity_reports_state_the_distance_of_both_sides_from_float64(tmp_path):
    row = {"section": "activations", "name": "logits", "error_a": 1e-7, "error_b": 2e-7, "difference": 3e-7}
    for name in ("float32", "TF32"):
        (tmp_path / name).mkdir()
        rows = [{**row, "share": 0.5}, {**row, "name": "blocks.0.attn.q", "share": 40.0 if name == "TF32" else 0.7}]
        (tmp_path / name / "report.json").write_text(json.dumps({"verdict": "a sentence", "rows": rows}))
    outcome = gpu_parts._summarize_parity(tmp_path, [0, 1, 2])
    assert {name: part["status"] for name, part in outcome.data.items()} == {
        "float32": "passed", "TF32": "measured", "bfloat16": "failed",
    }  # fmt: skip
    assert outcome.status == "failed"
    assert outcome.lines[:3] == [
        "float32: a sentence",
        "float32: activations: from float64 torch 1.0e-07, jax 2.0e-07; apart 3.0e-07; 70% of the bound, "
        "at blocks.0.attn.q",
        "float32: logits: from float64 torch 1.0e-07, jax 2.0e-07; apart 3.0e-07",
    ]


def test_a_gpu_that_is_absent_fails_every_part_that_needs_it(tmp_path):
    """Without imports of a framework: the parts of the GPU are those of the CPU, with larger work."""
    names = {device: [part.name for part in gpu_parts.parts(device, tmp_path)] for device in ("gpu", "cpu")}
    assert names["gpu"][: len(names["cpu"])] == names["cpu"]
    assert names["gpu"] == [
        "doctor", "parity", "sampled tokens", "training", "kill and resume",
        "benchmark train", "benchmark generate", "benchmark compile", "benchmark load",
    ]  # fmt: skip
    for part in gpu_parts.parts("gpu", tmp_path):
        for stage in part.stages:
            for command in stage:
                assert "JAX_PLATFORMS" not in command.environment
                assert "cpu" not in command.arguments


def test_a_script_that_is_terminated_leaves_no_process(tmp_path):
    """A scheduler's time limit, for example."""
    child, program, pid = (tmp_path / name for name in ("child.py", "program.py", "pid"))
    child.write_text(f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)")
    program.write_text(
        "import sys\n"
        f"sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'scripts')!r}]\n"
        "import test_gpu\n"
        "from measure.parts import Command, Outcome, Part\n"
        f"stages = [[Command(['-S', {str(child)!r}])]]\n"
        "test_gpu.parts = lambda *_: [Part('hangs', 1, stages, lambda *_: Outcome('passed', []))]\n"
        f"sys.argv = ['test_gpu.py', '--device', 'cpu', '--out', {str(tmp_path / 'out')!r}]\n"
        "test_gpu.main()\n"
    )
    process = subprocess.Popen([sys.executable, str(program)])
    wait_for_text(pid)
    process.terminate()
    assert process.wait(300) == 143
    wait_for_end(int(pid.read_text()))


@pytest.mark.parametrize(
    ("options", "message"), [(("--only", "nothing"), "no part has such a name"), (("--budget", "0"), "positive")]
)
def test_the_script_refuses_what_it_cannot_do(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["test_gpu.py", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=message):
        test_gpu.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_part_on_the_cpu(tmp_path):
    result = run_script("test_gpu.py", "--device", "cpu", "--budget", 1500, "--out", tmp_path, timeout=1700)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((tmp_path / "results.json").read_text())
    parts = {part["name"]: part for part in entries["parts"]}
    assert list(parts) == [part.name for part in gpu_parts.parts("cpu", tmp_path)]
    assert {name: part["status"] for name, part in parts.items() if part["status"] != "passed"} == {
        "benchmark train": "measured"
    }
    assert parts["training"]["float64"]["largest_difference"] < 1e-12
    assert parts["kill and resume"]["jax"]["largest_difference"] == 0
    assert parts["kill and resume"]["torch"]["largest_difference"] == 0
    assert all(entry["equal"] == entry["count"] == 24 for entry in parts["sampled tokens"]["compared"])
    assert {"gpt_jax", "gpt_torch, compiled"} <= set(parts["benchmark train"]["measurements"][0]["peers"])
    assert "Training step" in (tmp_path / "results.md").read_text()
