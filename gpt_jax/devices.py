"""Which device, dtype and attention a JAX run uses: chosen once, said aloud, never silently changed."""

import jax
import jaxlib

from parity.errors import InputError


def choose_device(name: str) -> jax.Device:
    """This process's first device of a kind: auto (JAX's own choice), cpu, gpu or tpu.

    Raises InputError, with JAX's reason, where there is none.
    """
    try:
        return jax.local_devices(backend=None if name == "auto" else name)[0]
    except RuntimeError as error:
        raise InputError(
            f"--device {name}: jax {jax.__version__} sees only {jax.devices()[0].platform} devices here "
            f"({str(error).splitlines()[0]}). "
            "For an NVIDIA GPU install the cuda13 extra (make setup EXTRAS=test,dev,tf,cuda13) and check nvidia-smi"
        ) from None


def choose_attention(name: str, device: jax.Device, dtype: str, drop_rate: float) -> str:
    """ "explicit" or "cudnn" for auto; raises InputError where cudnn is asked for and cannot run."""
    obstacles = [
        text
        for text, applies in (
            ("it needs a GPU", device.platform != "gpu"),
            ("it computes in 16 bit only: --dtype bfloat16", dtype == "float32"),
            ("it has no dropout: --drop-rate 0", drop_rate > 0),
        )
        if applies
    ]
    if name == "cudnn" and obstacles:
        raise InputError(f"--attention cudnn: {'; '.join(obstacles)}")
    if name == "auto":
        return "explicit" if obstacles else "cudnn"
    return name


def describe(device: jax.Device) -> str:
    return f"{device.platform} ({device.device_kind}), jax {jax.__version__}, jaxlib {jaxlib.__version__}"
