"""Which device a torch run uses: chosen once, said aloud, never silently changed."""

import torch

from parity.errors import InputError


def choose_device(name: str) -> torch.device:
    """auto (cuda, mps or cpu, the first there is), or one by name; raises InputError where it is missing."""
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_there in there.items() if is_there)
    if not there[name]:
        raise InputError(
            f"--device {name}: torch {torch.__version__} sees only {', '.join(k for k, v in there.items() if v)} here; "
            "install a torch build for it, and for cuda check nvidia-smi"
        )
    return torch.device(name)


def describe(device: torch.device) -> str:
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    return f"{device.type} ({kind}), torch {torch.__version__}"
