"""Estimate what a training run needs: memory per device, time, communication and disk space.

    python scripts/plan.py --preset 1558M --mesh fsdp=8 --accumulate 30 --tokens 10e9
    python scripts/plan.py --preset 124M-fineweb-edu --mesh data=8 --tokens 10e9
    python scripts/plan.py --preset 124M --tokens-per-s 500000          # measured by benchmark.py train --gpu
    python scripts/plan.py --preset 1558M --mesh fsdp=8 --accumulate 30 --compile --dtype float32     # also asks XLA

The estimate of memory is fitted to what XLA reports for compiled steps (gpt_jax/memory.py). The time is computed from
--mfu, the fraction of the device's peak rate that training is assumed to reach, or from a measured speed.
"""

import dataclasses
import math
from typing import Literal

from rich.table import Table

from parity.cli import parse
from parity.config import GPTConfig
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.training.flops import flops_per_token, peak_flops
from parity.training.settings import recipe
from parity.weights import n_params

with exit_with_message():
    import jax

    from gpt_jax.memory import communication_bytes, compiled_memory, memory
    from gpt_jax.sharding import MeshShape


@dataclasses.dataclass(frozen=True)
class Args:
    preset: str = "124M"
    """Preset of train_jax.py; it gives the model, the batch and the values of the options that are left out."""
    mesh: str = "data=1"
    """Number of devices along each axis of the mesh, as in train_jax.py: data=2,fsdp=2,tensor=2 for example."""
    accumulate: int | None = None
    """Number of micro-batches per step; by default the preset's."""
    tokens: float | None = None
    """Number of tokens to train on; by default those of the preset's steps."""
    device: str = "H100"
    """Name of the GPU, which gives its peak rate: A100, H100, H100 PCIe, H200, L40S, RTX 4090, ..."""
    memory_gb: float = 80.0
    """Memory of each device in GB."""
    mfu: float = 0.4
    """Assumed model FLOPs utilization: the fraction of the device's peak that training reaches."""
    tokens_per_s: float | None = None
    """Measured speed of one device in tokens per second; by default it is estimated from --device and --mfu."""
    link_gb_per_s: float = 400.0
    """Bandwidth between devices in each direction, in GB per second: about 400 with an H100's NVLink."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Dtype of the computation; by default the preset's."""
    remat: Literal["none", "products", "all"] | None = None
    """What the backward pass recomputes, as in train_jax.py; by default the preset's."""
    attention: Literal["explicit", "cudnn"] = "cudnn"
    """Attention implementation: cuDNN's fused kernel (cudnn) or the formula of the model file (explicit), which also
    stores the attention patterns."""
    compile: bool = False
    """Also compile the step for simulated CPU devices, with explicit attention, and print the memory XLA reports."""


def main() -> None:
    args, console = parse(Args, __doc__), PlainConsole()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    preset, shape = recipe(args.preset), MeshShape.parse(args.mesh)
    config, remat = preset.model, args.remat or preset.remat
    settings = dataclasses.replace(
        preset.settings,
        accumulate=preset.settings.accumulate if args.accumulate is None else args.accumulate,
        dtype=args.dtype or preset.settings.dtype,
    )
    micro_size = settings.batch_size // settings.accumulate
    shape.check(config, micro_size)
    for name in ("tokens", "memory_gb", "mfu", "link_gb_per_s", "tokens_per_s"):
        value, most = getattr(args, name), 1 if name == "mfu" else math.inf
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            limits = "between 0 and 1" if most == 1 else "positive"
            raise InputError(f"--{name.replace('_', '-')} must be {limits}, got {value}")

    estimate = memory(config, shape, micro_size, settings.dtype, remat, args.attention)
    table = Table("memory per device", "GB", title=f"{args.preset} over {shape}: {n_params(config):,} parameters")
    for name, size in dataclasses.asdict(estimate).items():
        table.add_row(name.replace("_", " "), f"{size / 1e9:.2f}")
    table.add_row("total", f"{estimate.total / 1e9:.2f}", style="bold")
    console.print(table)
    console.print(
        f"{micro_size} windows of {config.n_ctx} tokens per micro-batch, {settings.dtype}, {args.attention} attention, "
        f"remat {remat}",
    )
    if estimate.total > 0.9e9 * args.memory_gb:
        console.print(
            f"This is more than 90 % of {args.memory_gb:.0f} GB: raise --accumulate or fsdp, or use --remat products.",
            style="yellow",
        )

    tokens_per_step = settings.batch_size * config.n_ctx
    tokens = args.tokens or settings.steps * tokens_per_step
    speed, source = _tokens_per_s(args, config)
    seconds = tokens_per_step / (speed * shape.size)
    hours = tokens / (speed * shape.size) / 3600
    title = f"{tokens:,.0f} tokens, {tokens / tokens_per_step:,.0f} steps of {tokens_per_step:,}"
    table = Table("time", "", title=title)
    table.add_row("model FLOPs per token, 6N + 12LDT", f"{flops_per_token(config) / 1e9:.3f} GFLOP")
    table.add_row("tokens/s per device", f"{speed:,.0f} ({source})")
    table.add_row(f"tokens/s of {shape.size} without communication", f"{speed * shape.size:,.0f}")
    table.add_row("time per step", f"{seconds:.2f} s")
    table.add_row("total", f"{hours:,.1f} h, {hours * shape.size:,.1f} device hours")
    console.print(table)

    if shape.size > 1:
        table = Table("communication per device and step", "GB", "s without overlap")
        for name, size in communication_bytes(config, shape, micro_size, settings.accumulate, settings.dtype).items():
            table.add_row(name, f"{size / 1e9:.2f}", f"{size / 1e9 / args.link_gb_per_s:.3f}")
        console.print(table)
    # A checkpoint contains the train state (parameters and two moments) and model.safetensors (parameters).
    checkpoint = 4 * n_params(config) * (8 if settings.dtype == "float64" else 4)
    console.print(
        f"disk: {checkpoint / 1e9:.1f} GB per checkpoint, of which the newest {settings.keep} and the best are kept; "
        f"{tokens * 2 / 1e9:.1f} GB of uint16 tokens if no token is used twice",
        soft_wrap=True,
    )

    if args.compile:
        jax.config.update("jax_num_cpu_devices", shape.size)
        compiled = compiled_memory(config, shape, settings, remat)
        estimate = memory(config, shape, micro_size, settings.dtype, remat)
        console.print(
            f"XLA reports {compiled / 1e9:.2f} GB per device for {shape.size} CPU devices and explicit attention; "
            f"the estimate is {estimate.total / 1e9:.2f} GB",
            soft_wrap=True,
        )


def _tokens_per_s(args: Args, config: GPTConfig) -> tuple[float, str]:
    """Return the speed of one device, and where the figure comes from."""
    if args.tokens_per_s is not None:
        return args.tokens_per_s, "measured"
    peak = peak_flops(args.device)
    if peak is None:
        raise InputError(f"--device {args.device}: its peak rate is unknown; give --tokens-per-s")
    return args.mfu * peak / flops_per_token(config), f"assuming {args.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s"


if __name__ == "__main__":
    with exit_with_message():
        main()
