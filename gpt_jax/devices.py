"""The device and the attention implementation of a JAX run: chosen once, printed, and never changed silently."""

import os

import jax
import jaxlib

from parity.errors import InputError

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
        "cuda13 (pip install 'gpt-parity[jax,cuda13]') and check nvidia-smi"
    )


def _visible() -> str:
    """What JAX sees, or why it sees nothing."""
    try:
        return f"sees only {jax.devices()[0].platform} devices here"
    except Exception:
        platforms = os.environ.get("JAX_PLATFORMS")
        limited = f"; JAX_PLATFORMS={platforms} limits it, so correct or unset that" if platforms else ""
        return f"sees no devices here{limited}"


def choose_attention(name: str, device: jax.Device, dtype: str, drop_rate: float) -> str:
    """Return the attention implementation of a run, `explicit` or `cudnn`.

    Args:
        name: `explicit`, `cudnn`, or `auto` for cudnn wherever it can run.
        device: The device that computes.
        dtype: The dtype that the model computes in.
        drop_rate: The model's dropout rate.

    Raises:
        InputError: If cudnn is requested and cannot run; the message lists every reason.
    """
    obstacles = [
        text
        for text, applies in (
            ("it needs a GPU", device.platform != "gpu"),
            ("it computes in 16 bits only; use --dtype bfloat16", dtype != "bfloat16"),
            ("it does not support dropout; use --drop-rate 0", drop_rate > 0),
        )
        if applies
    ]
    if name == "cudnn" and obstacles:
        raise InputError(f"--attention cudnn: {'; '.join(obstacles)}")
    if name == "auto":
        return "explicit" if obstacles else "cudnn"
    return name


def describe(device: jax.Device) -> str:
    """Return the device's kind and the versions of the framework, for logs."""
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}, jaxlib {jaxlib.__version__}"
