"""The arrows: parity <- backends; importing one framework's package never loads the other's."""

import subprocess
import sys

import pytest

FORBIDDEN = {
    "parity": ["torch", "jax", "flax", "tensorflow"],
    "gpt_torch": ["jax", "flax", "tensorflow", "gpt_jax"],
    "gpt_jax": ["torch", "tensorflow", "gpt_torch"],
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports(package):
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
