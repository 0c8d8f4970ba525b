"""The device and the attention implementation of a JAX run: chosen once, printed, and never changed silently."""

import os
from typing import NamedTuple

import jax
import jaxlib

from parity.config import GPTConfig
from parity.errors import InputError, install_extras

DEVICES = ("auto", "cpu", "gpu", "cuda", "tpu")
"""Names that choose_device accepts; gpu and cuda mean the same, as in gpt_torch."""


def choose_device(name: str) -> jax.Device:
    """Return this process's first device of a kind.

    Args:
        name: One of DEVICES; `auto` is the kind that JAX prefers.

    Raises:
        InputError: For an unknown name, or if JAX sees no such device; the message has JAX's reason.
    """
    if name not in DEVICES:
        raise InputError(f"--device {name}: gpt_jax runs on {', '.join(DEVICES)}")
    platform = {"auto": None, "cuda": "gpu"}.get(name, name)
    try:
        return jax.local_devices(backend=platform)[0]
    except Exception as error:  # RuntimeError, and an AssertionError without a text if JAX_PLATFORMS names no platform
        reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise InputError(
        f"--device {name}: jax {jax.__version__} {_visible()} ({reason:.200}). For an NVIDIA GPU, install the extra "
        f"cuda13 ({install_extras('jax,cuda13')}) and check nvidia-smi"
    )


def _visible() -> str:
    """What JAX sees, or why it sees nothing."""
    try:
        return f"sees only {jax.devices()[0].platform} devices here"
    except Exception:
        platforms = os.environ.get("JAX_PLATFORMS")
        limited = f"; JAX_PLATFORMS={platforms} limits it, so correct or unset that" if platforms else ""
        return f"sees no devices here{limited}"


class Attention(NamedTuple):
    """The attention implementation of a run."""

    name: str
    """`explicit` or `cudnn`."""
    reason: str = ""
    """Why a run on a GPU in 16 bits does not use cuDNN's kernel, unless explicit attention was requested."""

    def __str__(self) -> str:
        return f"{self.name} (not cuDNN's kernel: {self.reason})" if self.reason else self.name


def choose_attention(name: str, device: jax.Device, dtype: str, config: GPTConfig) -> Attention:
    """Choose the attention implementation of a run.

    Args:
        name: `explicit`, `cudnn`, or `auto` for cudnn wherever it can run.
        device: The device that computes.
        dtype: The dtype that the model computes in.
        config: The model's configuration.

    Raises:
        InputError: If cudnn is requested and cannot run; the message lists every reason.
    """
    fits = device.platform == "gpu" and dtype == "bfloat16"
    obstacles = [] if device.platform == "gpu" else ["it needs a GPU"]
    obstacles += [] if dtype == "bfloat16" else ["it computes in 16 bits only; use --dtype bfloat16"]
    if config.drop_rate > 0:  # jax.nn has none, and the kernel's own has a seed that is fixed when it is compiled
        obstacles.append("it does not support dropout; use --drop-rate 0")
    capability = float(getattr(device, "compute_capability", "9.0"))
    head_size, largest = config.head_width, 256 if capability >= 9 else 128
    if head_size % 8 or head_size > largest:
        obstacles.append(f"it needs heads of 8, 16, ... or {largest} numbers, these have {head_size}")
    if capability < 8:
        obstacles.append(f"it needs a GPU of compute capability 8.0 (Ampere) or later, this is {capability}")
    if name == "cudnn" and obstacles:
        raise InputError(f"--attention cudnn: {'; '.join(obstacles)}")
    if name == "auto":
        return Attention("explicit", "; ".join(obstacles) if fits else "") if obstacles else Attention("cudnn")
    return Attention(name)


def describe(device: jax.Device) -> str:
    """Return the device's kind and the versions of the framework, for logs."""
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}, jaxlib {jaxlib.__version__}"
