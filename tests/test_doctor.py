"""python -m parity.doctor: its findings on healthy machines and on machines with problems."""

import subprocess
import sys

import pytest
from support.runs import ROOT

from parity import doctor
from parity.errors import install_extras

JAX_CPU = {"devices": ["cpu (cpu)"], "platform": "cpu", "precision": "default"}
JAX_GPU = {**JAX_CPU, "devices": ["gpu (NVIDIA H100)"], "platform": "gpu"}
CPU = {"devices": ["cpu (2 threads)"], "platform": "cpu", "precision": "highest"}
TORCH_CPU = {**CPU, "cudnn": None, "sdpa": []}
TORCH_GPU = {**TORCH_CPU, "devices": ["NVIDIA H100"], "platform": "gpu", "cudnn": 92600, "sdpa": ["flash", "cudnn"]}
GPU = ["NVIDIA H100, 580.10"]


def findings(gpus, jax, torch, **environment):
    report = list(doctor.examine(gpus, jax, torch, environment))
    return {f.name: f.value for f in report}, {f.name: f.problem for f in report if f.problem}


@pytest.fixture(autouse=True)
def no_tensorflow(monkeypatch):
    """Pretend that only these packages are installed; tests may change the dict."""
    versions = {"jax": "0.11.0", "torch": "2.13.0", "nvidia-cudnn-cu13": "9.26.0.51"}
    monkeypatch.setattr(doctor, "installed", versions.get)
    return versions


def test_healthy_machines():
    values, wrong = findings([], JAX_CPU, TORCH_CPU)
    assert not wrong
    assert values["jax"] == "0.11.0"
    assert values["flax"] == "not installed"
    assert "jax's GPU memory" not in values
    values, wrong = findings(GPU, JAX_GPU, TORCH_GPU)
    assert not wrong
    assert "TF32" in values["jax's matmul precision"]
    assert values["jax's GPU memory"].startswith("75% reserved at start")
    assert values["cuDNN"] == "nvidia-cudnn-cu13 9.26.0.51, torch reports 92600"
    values, _ = findings(GPU, JAX_GPU, TORCH_GPU, XLA_PYTHON_CLIENT_PREALLOCATE="false")
    assert values["jax's GPU memory"] == "allocated as needed"


def test_gpu_present_but_cpu_used_is_reported():
    _, wrong = findings(GPU, JAX_CPU, TORCH_CPU)
    assert wrong["jax's devices"].endswith("install its GPU build: make setup EXTRAS=cuda13")
    assert "build with CUDA" in wrong["torch's devices"]
    _, wrong = findings(GPU, JAX_CPU, TORCH_GPU, JAX_PLATFORMS="cpu")
    assert wrong == {
        "jax's devices": "JAX would run on the CPU although there is a GPU; unset JAX_PLATFORMS, which is cpu"
    }


def test_a_driver_that_is_too_old_for_cuda_13_is_explained():
    old = ["NVIDIA H100, 550.54.14"] * 2
    _, wrong = findings(old, JAX_CPU, TORCH_CPU)
    assert wrong == {
        "GPUs of the driver": "NVIDIA driver 550.54.14 is too old for CUDA 13, which needs 580 or later; update the "
        "driver (nvidia-smi shows its version), or use the CPU"
    }
    assert findings(old, None, TORCH_CPU)[1].keys() == wrong.keys()
    assert not findings(old, JAX_GPU, TORCH_GPU)[1]  # builds for an older CUDA
    assert "GPUs of the driver" not in findings(["NVIDIA X, [Unknown]"], JAX_CPU, TORCH_CPU)[1]


def test_other_problems_are_reported(no_tensorflow):
    _, wrong = findings([], {"error": "ImportError: no jaxlib"}, TORCH_CPU)
    assert "no jaxlib" in wrong["jax's devices"]
    _, wrong = findings(GPU, JAX_GPU, TORCH_GPU, XLA_PYTHON_CLIENT_MEM_FRACTION="most")
    assert "must be a number" in wrong["jax's GPU memory"]
    _, wrong = findings([], JAX_CPU, {**TORCH_CPU, "precision": "high"})
    assert "'highest'" in wrong["torch's matmul precision"]
    no_tensorflow["nvidia-cudnn-cu12"] = "9.1.0.70"
    _, wrong = findings(GPU, JAX_GPU, TORCH_GPU)
    assert "two CUDA generations" in wrong["cuDNN"]
    del no_tensorflow["nvidia-cudnn-cu13"]
    _, wrong = findings(GPU, JAX_GPU, TORCH_GPU)
    assert "older than JAX needs" in wrong["cuDNN"]
    no_tensorflow["tensorflow"] = "2.21.0"
    _, wrong = findings([], JAX_CPU, TORCH_CPU)
    assert "tensorflow-cpu" in wrong["tensorflow"]


def test_a_backend_that_is_not_installed_is_no_problem_but_none_at_all_is_one():
    values, wrong = findings([], None, TORCH_CPU)
    assert not wrong
    assert install_extras("jax") in values["jax's devices"]
    values, wrong = findings(GPU, JAX_GPU, None)
    assert not wrong
    assert install_extras("torch") in values["torch's devices"]
    _, wrong = findings([], None, None)
    assert list(wrong) == ["frameworks"]


def test_frameworks_that_break_are_reported_not_raised():
    assert doctor.ask("raise SystemExit('boom')") == {"error": "boom"}
    assert "error" in doctor.ask("print('no json')")


def test_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "parity.doctor"], capture_output=True, text=True, timeout=300, cwd=ROOT
    )
    assert done.returncode in (0, 1), done.stderr
    assert "jax's devices" in done.stdout
    assert "torch's devices" in done.stdout
    assert ("no problems found" in done.stdout) == (done.returncode == 0)
