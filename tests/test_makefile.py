"""What make installs on machines with and without an NVIDIA driver, for which a stand-in of nvidia-smi answers."""

import os
import re
import shutil
import subprocess

import pytest
import train_jax
from support.runs import ROOT
from support.workers import count_workers

from parity import doctor
from parity.training.args import parse_job_args

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")


def commands(target, answer, folder, *variables, status=0):
    """Return what make would run for a target in an empty folder, where nvidia-smi prints `answer`."""
    program(folder / "nvidia-smi", f"printf '{answer}'\nexit {status}")
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if "EXTRAS" not in name} | {"PATH": path}
    command = ["make", "--dry-run", f"VENV={folder / 'venv'}", target, *variables]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout


def extras(output):
    return re.findall(r"--editable '\.\[(.*?)\]'", output)


def make(*arguments):
    """Run make, which ends with an error; return what it prints on standard error."""
    done = subprocess.run(["make", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    return done.stderr


def program(path, text):
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_an_environment_that_cannot_be_made_whole_is_removed(tmp_path):
    """Debian's python3 without the package python3-venv makes the folder before it fails."""
    python = program(
        tmp_path / "python", 'if test "$2" = venv; then mkdir -p "$3/bin"; cp /bin/sh "$3/bin/python"; exit 1; fi'
    )
    for _ in range(2):
        assert "No module named pip" not in make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
        assert not (tmp_path / "venv").exists()


def test_other_versions_of_python_are_refused(tmp_path):
    python = program(tmp_path / "python", "exit 1")
    error = make("setup", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}")
    assert f"{python} is not Python 3.11, 3.12 or 3.13; name one that is: make PYTHON=python3.12\n" in error
    assert not (tmp_path / "venv").exists()


def test_clusters_do_not_need_what_the_other_tests_need(tmp_path):
    assert extras(commands("test-clusters", "", tmp_path)) == ["jax,torch,clusters"]


@pytest.mark.parametrize(
    ("cores", "memory", "count"), [(2, 128e9, 2), (64, 128e9, 4), (4, 16e9, 3), (4, 8e9, 1), (1, 4e9, 1)]
)
def test_tests_run_on_as_many_cores_as_the_memory_allows(cores, memory, count):
    assert count_workers(cores, memory) == count


TESTS = "jax,torch,tf,test,dev"


@pytest.mark.parametrize("answer", ["580.65.06\\n", "595.10\\n595.10\\n"])
def test_a_driver_for_cuda_13_selects_it(answer, tmp_path):
    train = commands("train", answer, tmp_path)
    assert extras(train) == ["jax,cuda13"]
    assert f"NVIDIA driver {answer[:3]}: JAX for CUDA 13" in train
    assert "train_jax.py --device gpu \n" in train  # an error if JAX cannot use it
    assert "train_jax.py --device gpu --device cpu\n" in commands("train", answer, tmp_path, "ARGS=--device cpu")
    assert parse_job_args(train_jax.Args, "", ["--device", "gpu", "--device", "cpu"]).device == "cpu"
    for target in ("test", "test-gpu"):
        assert extras(commands(target, answer, tmp_path)) == [f"{TESTS},cuda13"]
    chosen = commands("train", answer, tmp_path, "EXTRAS=jax")
    assert extras(chosen) == ["jax"]
    assert "--device" not in chosen
    assert chosen.count("without the extra cuda13 JAX uses the CPU alone") == 2  # when it installs, and at each start
    assert extras(commands("test", answer, tmp_path, "TEST_EXTRAS=jax")) == ["jax"]
    own = commands("train", answer, tmp_path, "EXTRAS=jax,torch,cuda13")
    assert extras(own) == ["jax,torch,cuda13"]
    assert "JAX for CUDA 13" in own
    assert "--device gpu" in own


def test_a_driver_that_is_too_old_is_named(tmp_path):
    output = commands("train", "550.54.14\\n", tmp_path)
    assert extras(output) == ["jax"]
    message = (
        f"NVIDIA driver 550 cannot run CUDA 13: only the CPU is used. Update the driver to {doctor._OLDEST_DRIVER}"
    )
    assert output.count(message) == 2  # when it installs, and at each start
    assert extras(commands("test", "550.54.14\\n", tmp_path)) == [TESTS]


@pytest.mark.parametrize("status", [0, 9, 127])
def test_without_a_driver_the_cpu_is_used_silently(status, tmp_path):
    output = commands("train", "NVIDIA-SMI has failed because it could not communicate\\n", tmp_path, status=status)
    assert extras(output) == ["jax"]
    assert "NVIDIA" not in output
