"""The wheel and the sdist are built, installed in an empty environment, and used outside the source tree."""

import importlib.metadata
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import parity

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*command, cwd, timeout=1200):
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, timeout=timeout)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


def requirement_names(requirements):
    names = {re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-") for requirement in requirements}
    return names - {"gpt-parity"}


def test_version_is_declared_once():
    assert "version" in PROJECT["dynamic"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", parity.__version__)
    assert f"## {parity.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {parity.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_constraints_pin_every_declared_package():
    pinned = requirement_names((ROOT / "constraints.txt").read_text().splitlines()[1:])
    extras = PROJECT["optional-dependencies"]
    declared = requirement_names(
        requirement for name, extra in extras.items() if name not in ("cuda13", "wandb") for requirement in extra
    )
    declared |= requirement_names(PROJECT["dependencies"])
    assert declared - pinned == {"tensorflow"}  # of other platforms than the one that the pins come from


def test_base_dependencies_hold_no_framework():
    frameworks = {"jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "tensorflow", "transformers"}
    assert not requirement_names(PROJECT["dependencies"]) & frameworks


@pytest.mark.parametrize(("package", "extra"), [("jax", "jax"), ("orbax", "jax"), ("torch", "torch")])
def test_absent_package_names_its_extra(package, extra):
    """A script whose framework is not installed ends with one line that says what to install."""
    program = f"import sys; sys.modules[{package!r}] = None; sys.argv = ['train_{extra}.py', '--help']; "
    program += f"import runpy; runpy.run_path('scripts/train_{extra}.py', run_name='__main__')"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 2, result.stderr
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"-m pip install -c constraints.txt -e '.[{extra}]'" in line


@pytest.mark.package
@pytest.mark.timeout(1800)
def test_wheel_and_sdist(tmp_path):
    run(sys.executable, "-m", "build", "--outdir", tmp_path / "dist", ROOT, cwd=tmp_path)
    [wheel] = (tmp_path / "dist").glob("*.whl")
    [sdist] = (tmp_path / "dist").glob("*.tar.gz")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "parity", "gpt_jax", "gpt_torch", f"gpt_parity-{parity.__version__}.dist-info",
    }  # fmt: skip
    assert {"parity/py.typed", "gpt_jax/py.typed", "gpt_torch/py.typed"} <= set(names)
    static = {f"parity/serving/static/{path.name}" for path in (ROOT / "parity/serving/static").iterdir()}
    assert static <= set(names)
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "source", filter="data")
    [source] = (tmp_path / "source").iterdir()
    for path in ("scripts/train_jax.py", "tests/conftest.py", "docs", "LICENSE", "CHANGELOG.md", "constraints.txt"):
        assert (source / path).exists(), path

    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / "bin" / "python"
    constraints = ("--constraint", ROOT / "constraints.txt")
    pip = (python, "-m", "pip", "--quiet", "install", *constraints)
    away = tmp_path / "away"
    away.mkdir()

    # parity alone, then with JAX. Nothing of the source tree is on the path.
    run(*pip, wheel, cwd=away)
    program = "import parity, sys; print(parity.__file__, 'jax' in sys.modules, parity.__version__)"
    file, jax_loaded, version = run(python, "-c", program, cwd=away).split()
    assert file.startswith(str(tmp_path / "venv"))
    assert (jax_loaded, version) == ("False", parity.__version__)
    run(*pip, f"{wheel}[jax]", cwd=away)
    run(python, "-c", "import gpt_jax; gpt_jax.GPTModel('tiny')", cwd=away)
    assert "torch" in run(python, "-m", "parity.doctor", cwd=away)
    script = source / "scripts" / "train_jax.py"
    run(python, script, "--preset", "tiny", "--steps", "20", "--run", away / "run", cwd=away)
    assert (away / "run" / "checkpoints" / "000020" / "model.safetensors").exists()

    # The sdist installs as well, and gives the same files.
    wheel_files = run(python, "-m", "pip", "show", "--files", "gpt-parity", cwd=away).partition("Files:")[2]
    run(*pip, "--force-reinstall", "--no-deps", sdist, cwd=away)
    sdist_files = run(python, "-m", "pip", "show", "--files", "gpt-parity", cwd=away).partition("Files:")[2]
    assert set(sdist_files.split()) - set(wheel_files.split()) == set()
    run(python, "-c", "import gpt_jax; gpt_jax.GPTModel('tiny')", cwd=away)


def test_installed_metadata_is_this_version():
    assert importlib.metadata.version("gpt-parity") == parity.__version__
