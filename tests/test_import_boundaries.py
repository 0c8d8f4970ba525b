"""The dependency rule: parity <- backends <- scripts, the layers inside each package, and what an import loads."""

import subprocess
import sys
from pathlib import Path

import pytest

import parity

ROOT = Path(__file__).parents[1]
FORBIDDEN = {
    "parity": ["torch", "jax", "flax", "tensorflow"],
    "gpt_torch": ["jax", "flax", "tensorflow", "gpt_jax"],
    "gpt_jax": ["torch", "tensorflow", "gpt_torch"],
}


def test_import_contracts():
    """The contracts in pyproject.toml hold; they cover every import in the source, also those inside functions."""
    program = "import sys; from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 broken." in result.stdout


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports(package):
    """The modules that are loaded at run time, including those that other packages load."""
    program = (
        "import importlib, pkgutil, sys\n"
        f"package = importlib.import_module({package!r})\n"
        "for module in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
        "    importlib.import_module(module.name)\n"
        f"loaded = [name for name in {FORBIDDEN[package]!r} if name in sys.modules]\n"
        "assert not loaded, loaded\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("package", "unneeded"),
    [
        ("parity", ["torch", "jax", "numpy", "requests", "rich", "tiktoken"]),
        ("gpt_torch", ["jax", "requests", "rich", "tiktoken", "matplotlib"]),
        ("gpt_jax", ["torch", "requests", "tiktoken", "matplotlib"]),  # Flax itself imports rich
    ],
)
def test_importing_a_package_loads_no_more_than_it_needs(package, unneeded):
    program = f"import sys, {package}; print([name for name in {unneeded!r} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout == "[]\n", result.stderr


def test_the_tokenizer_is_exported_lazily():
    program = "import parity; t = parity.load_tokenizer('bytes'); print(t.decode(t.encode('text')), parity.__version__)"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.stdout == f"text {parity.__version__}\n", result.stderr
    assert set(parity.__all__) >= {"GPTConfig", "PRESETS", "as_config", "InputError", "load_tokenizer"}
    with pytest.raises(AttributeError, match="has no attribute 'tokenizer_of'"):
        _ = parity.tokenizer_of
