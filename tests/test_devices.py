"""Devices and compilers that are not there."""

import jax
import pytest
import torch

import gpt_jax.devices
import gpt_torch.devices
from parity.errors import InputError


@pytest.mark.parametrize(
    "error",
    [AssertionError(), RuntimeError("Unable to initialize backend 'tpu'\nmore"), IndexError("list index out of range")],
    ids=repr,
)
@pytest.mark.parametrize("name", ["auto", "gpu", "cuda", "tpu"])
def test_a_platform_that_jax_cannot_start_is_one_line(name, error, monkeypatch):
    """JAX 0.10 raises an AssertionError without a text for JAX_PLATFORMS=cuda."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(jax, "local_devices", fail)
    monkeypatch.setattr(jax, "devices", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(InputError, match=f"--device {name}: jax .* sees no devices here; JAX_PLATFORMS=cuda") as caught:
        gpt_jax.devices.choose_device(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "error",
    [RuntimeError("\nInvalidCxxCompiler: none found\nmore"), AssertionError(), OSError("no Python.h")],
    ids=repr,
)
def test_a_missing_compiler_is_one_line(error, monkeypatch):
    def compile(function):
        def fail(_):
            raise error

        return fail

    monkeypatch.setattr(torch, "compile", compile)
    with pytest.raises(InputError, match=r"--compile: .*g\+\+.*CXX") as caught:
        gpt_torch.devices.check_compile(torch.device("cpu"))
    assert "\n" not in str(caught.value)
