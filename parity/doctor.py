"""python -m parity.doctor: what each framework would run on here, what is about to go wrong, and what to do.

Each framework is asked in a process of its own, so that neither changes what the other sees. Exit status: 0 if
nothing is wrong, 1 if something is.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any, NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "numpy", "tiktoken", "tensorflow-cpu")
# What pip installs of CUDA beside JAX; torch names its own.
_CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")

_ASK_JAX = """
import json, jax
devices = jax.devices()
print(json.dumps({
    "devices": [f"{d.platform} ({d.device_kind})" for d in devices],
    "platform": devices[0].platform,
    "precision": jax.config.jax_default_matmul_precision or "default",
    "x64": bool(jax.config.jax_enable_x64),
}))
"""
_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    + (["mps"] if torch.backends.mps.is_available() else []) + [f"cpu ({torch.get_num_threads()} threads)"],
    "platform": "gpu" if cuda else "cpu",
    "cuda": torch.version.cuda,
    "cudnn": torch.backends.cudnn.version() if cuda else None,
    "precision": torch.get_float32_matmul_precision(),
    "sdpa": [n for n in ("flash", "mem_efficient", "cudnn", "math")
             if cuda and getattr(torch.backends.cuda, f"{n}_sdp_enabled")()],
}))
"""
_SMALLEST_CUDNN = (9, 8)  # jax's wheels are built for it; older ones make JAX fall back to the CPU


class Finding(NamedTuple):
    """One line of the report."""

    what: str
    value: str
    wrong: str = ""
    """What to do, where it is wrong"""


def ask(program: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """What a framework says of itself; {"error": its last words} where it cannot start."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment
        )
        if done.returncode == 0:
            return {**json.loads(done.stdout.strip().splitlines()[-1]), "warnings": done.stderr}
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"error": str(error)}


def nvidia_gpus() -> list[str]:
    """Names of the GPUs that the driver sees."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []


def installed(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def examine(
    gpus: list[str], jax: Mapping[str, Any], torch: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Findings from what the driver and each framework say, and the environment's variables."""
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for name in PACKAGES:
        yield Finding(name, installed(name) or "not installed")
    yield Finding("GPUs of the driver", "; ".join(gpus) or "none")
    for name, said in (("jax", jax), ("torch", torch)):
        if "error" in said:
            yield Finding(name, "does not start", f"{said['error']}; install it again: make setup")
            continue
        wrong = ""
        if gpus and said["platform"] == "cpu":
            extra = "make setup EXTRAS=test,dev,tf,cuda13" if name == "jax" else "a torch build with CUDA"
            wrong = f"it would run on the CPU although there is a GPU; install {extra}"
            if name == "jax" and environment.get("JAX_PLATFORMS", "") == "cpu":
                wrong = "it would run on the CPU although there is a GPU, as JAX_PLATFORMS=cpu asks; unset it"
        yield Finding(f"{name}'s devices", "; ".join(said["devices"]), wrong)
    if "error" not in jax:
        on_gpu = jax["platform"] == "gpu"
        note = ", which is TF32 on this GPU; parity needs highest" if on_gpu and jax["precision"] == "default" else ""
        yield Finding("jax's products", f"{jax['precision']}{note}")
        yield Finding("jax's attention", "cudnn in 16 bit without dropout, else explicit" if on_gpu else "explicit")
        if on_gpu:
            yield _preallocation(environment)
            yield _cudnn(torch)
    if "error" not in torch:
        wrong = ""
        if torch["precision"] != "highest":
            wrong = "float32 products are not in full; torch.set_float32_matmul_precision('highest') for parity"
        yield Finding("torch's products", torch["precision"], wrong)
        kernels = ", ".join(torch["sdpa"]) or "explicit, or the CPU's fused kernel (sdpa)"
        yield Finding("torch's attention", kernels)
    if installed("tensorflow"):
        yield Finding(
            "tensorflow", "with GPU support", "it takes the GPU's memory when imported; prefer tensorflow-cpu"
        )


def _preallocation(environment: Mapping[str, str]) -> Finding:
    off = environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0")
    part = environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    share = "as it needs it" if off else f"{float(part):.0%} at once; XLA_PYTHON_CLIENT_PREALLOCATE=false to share it"
    return Finding("jax's GPU memory", share)


def _cudnn(torch: Mapping[str, Any]) -> Finding:
    """JAX and torch in one process use the cuDNN that was loaded first."""
    there = {name: found for name in _CUDNN if (found := installed(name))}
    if not there:
        return Finding("cuDNN", "not from pip; the system's is used")
    wrong = ""
    for name, found in there.items():
        if tuple(int(part) for part in found.split(".")[:2]) < _SMALLEST_CUDNN:
            wrong = f"{name} {found} is older than JAX needs; pip install -U {name}"
    if len(there) > 1:
        wrong = "two CUDA generations are installed; keep one"
    theirs = f", torch reports {torch['cudnn']}" if torch.get("cudnn") else ""
    return Finding("cuDNN", "; ".join(f"{name} {found}" for name, found in there.items()) + theirs, wrong)


def main() -> int:
    console = Console()
    with console.status("asking both frameworks"):
        findings = list(examine(nvidia_gpus(), ask(_ASK_JAX), ask(_ASK_TORCH), os.environ))
    table = Table(box=SIMPLE, show_header=False)
    for finding in findings:
        table.add_row(finding.what, finding.value, style="bold red" if finding.wrong else None)
    console.print(table)
    wrong = [finding for finding in findings if finding.wrong]
    for finding in wrong:
        console.print(f"wrong: {finding.what}: {finding.wrong}", style="bold red", highlight=False, soft_wrap=True)
    if not wrong:
        console.print("nothing is wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
