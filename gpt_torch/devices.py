"""The device of a torch run: chosen once, printed, and never changed silently."""

import torch

from parity.errors import InputError

DEVICES = ("auto", "cpu", "gpu", "cuda", "mps")
"""Names that choose_device accepts; gpu and cuda mean the same, as in gpt_jax."""


def choose_device(name: str) -> torch.device:
    """Return the device of a run.

    Args:
        name: One of DEVICES; `auto` is the first of cuda, mps and cpu that torch sees.

    Raises:
        InputError: For an unknown name, or if torch sees no such device.
    """
    if name not in DEVICES:
        raise InputError(f"--device {name}: gpt_torch runs on {', '.join(DEVICES)}")
    visible = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    kinds = [kind for kind, is_visible in visible.items() if is_visible]
    kind = kinds[0] if name == "auto" else {"gpu": "cuda"}.get(name, name)
    if kind not in kinds:
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees only {', '.join(kinds)} here; install a build of torch "
            "that supports it and, for an NVIDIA GPU, check nvidia-smi"
        )
    return torch.device(kind)


def check_compile(device: torch.device) -> None:
    """Raise InputError if torch.compile cannot build programs for a device, for example without a C++ compiler."""
    import torch._inductor.config as inductor

    try:
        with inductor.patch(fx_graph_cache=False):  # a program of an earlier run says nothing about the compiler
            torch.compile(lambda x: x.sin() + 1)(torch.ones(8, device=device))
    except Exception as error:  # dynamo, inductor and triton each have their own types
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise InputError(
            f"--compile: torch.compile cannot build programs for {device.type} here ({reason:.200}); install a C++ "
            "compiler such as g++, name one in the environment variable CXX, or leave out --compile"
        ) from None


def describe(device: torch.device) -> str:
    """Return the device's kind and the version of the framework, for logs."""
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({kind}), torch {torch.__version__}"
