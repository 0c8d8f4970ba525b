"""Devices and compilers that are not there, and the attention of a device."""

import dataclasses
from types import SimpleNamespace

import jax
import pytest
import torch

import gpt_jax.devices
import gpt_torch.devices
from gpt_jax.devices import Attention, choose_attention
from parity.config import PRESETS
from parity.errors import InputError
from parity.training.settings import recipe


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


H100 = SimpleNamespace(platform="gpu", compute_capability="9.0")
A100, T4 = (SimpleNamespace(platform="gpu", compute_capability=number) for number in ("8.0", "7.5"))
CPU = SimpleNamespace(platform="cpu")


@pytest.mark.parametrize("preset", ["124M", "355M", "774M", "1558M"])
@pytest.mark.parametrize("device", [H100, A100])
def test_gpus_use_cudnn_in_16_bits(preset, device):
    config = recipe(preset).model
    assert choose_attention("auto", device, "bfloat16", config) == Attention("cudnn") == ("cudnn", "")
    assert choose_attention("explicit", device, "bfloat16", config) == ("explicit", "")
    assert choose_attention("auto", device, "float32", config) == ("explicit", "")
    assert choose_attention("auto", CPU, "bfloat16", config) == ("explicit", "")


@pytest.mark.parametrize(
    ("device", "changes", "reason"),
    [
        (H100, {"drop_rate": 0.1}, "does not support dropout"),
        (H100, {"n_head": 64}, "these have 12"),
        (A100, {"n_head": 3}, "heads of 8, 16, ... or 128 numbers, these have 256"),
        (T4, {}, "compute capability 8.0 (Ampere) or later, this is 7.5"),
    ],
)
def test_explicit_attention_on_a_gpu_states_its_reason(device, changes, reason):
    config = dataclasses.replace(PRESETS["124M"], **changes)
    name, stated = attention = choose_attention("auto", device, "bfloat16", config)
    assert name == "explicit"
    assert reason in stated
    assert str(attention) == f"explicit (not cuDNN's kernel: {stated})"
    with pytest.raises(InputError, match="--attention cudnn: "):
        choose_attention("cudnn", device, "bfloat16", config)
