"""Report the devices and kernels that each framework would use, and likely problems: python -m parity.doctor.

Each framework is queried in a process of its own, so that neither changes what the other sees. A framework that is
not installed is reported as such. The exit status is 0 if no problem was found, and 1 otherwise.
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
from rich.table import Table

from parity.console import PlainConsole
from parity.errors import exit_with_message, install_extras, pip_install

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "torch", "numpy", "tiktoken", "tensorflow-cpu")
_CUDNN = ("nvidia-cudnn-cu13", "nvidia-cudnn-cu12")  # the packages that JAX uses; torch reports its own version
_MIN_CUDNN = (9, 8)  # jax's wheels are built for it; with an older one JAX falls back to the CPU
_OLDEST_DRIVER = 580  # of CUDA 13, for which the extra cuda13 and PyTorch's package are built

_ASK_JAX = """
import json, jax
devices = jax.devices()
print(json.dumps({
    "devices": [f"{d.platform} ({d.device_kind})" for d in devices],
    "platform": devices[0].platform,
    "precision": jax.config.jax_default_matmul_precision or "default",
}))
"""
_ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
print(json.dumps({
    "devices": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    + (["mps"] if torch.backends.mps.is_available() else []) + [f"cpu ({torch.get_num_threads()} threads)"],
    "platform": "gpu" if cuda else "cpu",
    "cudnn": torch.backends.cudnn.version() if cuda else None,
    "precision": torch.get_float32_matmul_precision(),
    "sdpa": [n for n in ("flash", "mem_efficient", "cudnn", "math")
             if cuda and getattr(torch.backends.cuda, f"{n}_sdp_enabled")()],
}))
"""
_PROGRAMS = {"jax": _ASK_JAX, "torch": _ASK_TORCH}


class Finding(NamedTuple):
    """One line of the report."""

    name: str
    value: str
    problem: str = ""
    """What is wrong and what to do about it; empty if nothing is."""


def ask(program: str, environment: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Run a Python program that prints a JSON object; return the object, or {"error": the last line} if it fails."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=300, env=environment
        )
        if done.returncode == 0:
            return json.loads(done.stdout.strip().splitlines()[-1])
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    except (subprocess.TimeoutExpired, ValueError, IndexError) as error:
        return {"error": str(error)}


def nvidia_gpus() -> list[str]:
    """Return the name and driver version of each GPU that the NVIDIA driver lists."""
    if shutil.which("nvidia-smi") is None:
        return []
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return listed.stdout.strip().splitlines() if listed.returncode == 0 else []


def installed(package: str) -> str | None:
    """Return the version of an installed package, or None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def examine(
    gpus: list[str], jax: Mapping[str, Any] | None, torch: Mapping[str, Any] | None, environment: Mapping[str, str]
) -> Iterator[Finding]:
    """Yield the lines of the report, with the problems that the facts about this machine imply.

    Args:
        gpus: The result of `nvidia_gpus`.
        jax: The result of `ask` for JAX; None if JAX is not installed.
        torch: The result of `ask` for PyTorch; None if PyTorch is not installed.
        environment: The environment variables.
    """
    yield Finding("python", f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        yield Finding(package, installed(package) or "not installed")
    driver_problem = _old_driver(gpus, jax or {}, torch or {})
    yield Finding("GPUs of the driver", "; ".join(gpus) or "none", driver_problem)
    if driver_problem:
        gpus = []  # which no framework can use
    if jax is None and torch is None:
        yield Finding(
            "frameworks",
            "none",
            f"neither backend can be used; install one: {install_extras('jax')}",
        )
    yield from _examine_jax(gpus, jax, torch or {}, environment)
    yield from _examine_torch(gpus, torch)
    if installed("tensorflow"):
        problem = "it reserves the GPU's memory when it is imported; install tensorflow-cpu instead"
        yield Finding("tensorflow", "with GPU support", problem)


def _old_driver(gpus: list[str], jax: Mapping[str, Any], torch: Mapping[str, Any]) -> str:
    """Return what is wrong with the driver; nothing if a framework can use the GPU, as builds for CUDA 12 may."""
    versions = [gpu.rpartition(", ")[2] for gpu in gpus]
    old = [v for v in versions if v.partition(".")[0].isdecimal() and int(v.partition(".")[0]) < _OLDEST_DRIVER]
    if not old or "gpu" in (jax.get("platform"), torch.get("platform")):
        return ""
    return (
        f"NVIDIA driver {old[0]} is too old for CUDA 13, which needs {_OLDEST_DRIVER} or later; update the driver "
        "(nvidia-smi shows its version), or use the CPU"
    )


def _examine_jax(
    gpus: list[str], jax: Mapping[str, Any] | None, torch: Mapping[str, Any], environment: Mapping[str, str]
) -> Iterator[Finding]:
    if jax is None:
        yield Finding("jax's devices", f"not installed; to use gpt_jax: {install_extras('jax')}")
        return
    if "error" in jax:
        yield Finding("jax's devices", "JAX does not start", f"{jax['error']}; reinstall it: make setup")
        return
    problem = ""
    if gpus and jax["platform"] == "cpu":
        problem = "JAX would run on the CPU although there is a GPU; "
        if environment.get("JAX_PLATFORMS", "") == "cpu":
            problem += "unset JAX_PLATFORMS, which is cpu"
        else:
            problem += "install its GPU build: make setup EXTRAS=cuda13"
    yield Finding("jax's devices", "; ".join(jax["devices"]), problem)
    on_gpu = jax["platform"] == "gpu"
    note = ", which is TF32 on this GPU; parity needs highest" if on_gpu and jax["precision"] == "default" else ""
    yield Finding("jax's matmul precision", f"{jax['precision']}{note}")
    yield Finding("jax's attention", "cudnn in 16 bits without dropout, otherwise explicit" if on_gpu else "explicit")
    if on_gpu:
        yield _gpu_memory(environment)
        yield _cudnn(torch)


def _gpu_memory(environment: Mapping[str, str]) -> Finding:
    name, fraction = "jax's GPU memory", environment.get("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.75")
    if environment.get("XLA_PYTHON_CLIENT_PREALLOCATE", "").lower() in ("false", "0"):
        return Finding(name, "allocated as needed")
    try:
        value = f"{float(fraction):.0%} reserved at start; XLA_PYTHON_CLIENT_PREALLOCATE=false allocates as needed"
    except ValueError:
        return Finding(name, fraction, "XLA_PYTHON_CLIENT_MEM_FRACTION must be a number such as 0.75")
    return Finding(name, value)


def _cudnn(torch: Mapping[str, Any]) -> Finding:
    """Check the version of cuDNN. A process that imports both frameworks has one cuDNN, the first that was loaded."""
    versions = {package: number for package in _CUDNN if (number := installed(package))}
    if not versions:
        return Finding("cuDNN", "not installed by pip; JAX uses the system's")
    problem = ""
    for package, number in versions.items():
        if tuple(int(part) for part in number.split(".")[:2]) < _MIN_CUDNN:
            problem = f"{package} {number} is older than JAX needs; update it: {pip_install(f'-U {package}')}"
    if len(versions) > 1:
        problem = "packages of two CUDA generations are installed; uninstall one of them"
    of_torch = f", torch reports {torch['cudnn']}" if torch.get("cudnn") else ""
    listed = "; ".join(f"{package} {number}" for package, number in versions.items())
    return Finding("cuDNN", listed + of_torch, problem)


def _examine_torch(gpus: list[str], torch: Mapping[str, Any] | None) -> Iterator[Finding]:
    if torch is None:
        yield Finding("torch's devices", f"not installed; to use gpt_torch: {install_extras('torch')}")
        return
    if "error" in torch:
        yield Finding("torch's devices", "PyTorch does not start", f"{torch['error']}; reinstall it: make setup")
        return
    problem = ""
    if gpus and torch["platform"] == "cpu":
        problem = "PyTorch would run on the CPU although there is a GPU; install a build with CUDA"
    yield Finding("torch's devices", "; ".join(torch["devices"]), problem)
    problem = ""
    if torch["precision"] != "highest":
        problem = "parity needs full float32 products: torch.set_float32_matmul_precision('highest')"
    yield Finding("torch's matmul precision", torch["precision"], problem)
    kernels = ", ".join(torch["sdpa"]) or "explicit, or the CPU's fused kernel (sdpa)"
    yield Finding("torch's attention", kernels)


def main() -> int:
    """Print the report, and return the exit status."""
    console = PlainConsole()
    with console.status("querying the frameworks"):
        jax, torch = (ask(program) if installed(name) else None for name, program in _PROGRAMS.items())
        findings = list(examine(nvidia_gpus(), jax, torch, os.environ))
    table = Table(box=SIMPLE, show_header=False)
    for finding in findings:
        table.add_row(finding.name, finding.value, style="bold red" if finding.problem else None)
    console.print(table)
    problems = [finding for finding in findings if finding.problem]
    for finding in problems:
        console.print(f"problem: {finding.name}: {finding.problem}", style="bold red", soft_wrap=True)
    if not problems:
        console.print("no problems found")
    return int(bool(problems))


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
