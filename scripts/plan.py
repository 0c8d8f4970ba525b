"""What a training run needs: memory of each device, time, messages, room on the disk.

    python scripts/plan.py --preset 1558M --mesh fsdp=8 --accumulate 30 --tokens 10e9
    python scripts/plan.py --preset 124M-fineweb-edu --mesh data=8 --tokens 10e9
    python scripts/plan.py --preset 124M --tokens-per-s 500000          # measured by benchmark.py train --gpu
    python scripts/plan.py --preset 1558M --mesh fsdp=8 --accumulate 30 --compile --dtype float32     # asks XLA too

The memory model is fitted to XLA's accounts of compiled steps (gpt_jax/plan.py); time follows from the share of
the device's peak that is reached, or from tokens/s that were measured.
"""

import dataclasses
from typing import Literal

from rich.console import Console
from rich.table import Table

from parity.cli import parse
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
    """Model and batch of a preset of train_jax.py."""
    mesh: str = "data=1"
    """Devices, as train_jax.py takes them."""
    accumulate: int | None = None
    """Micro-batches of a step; by default the preset's."""
    tokens: float | None = None
    """To train on; by default the preset's steps."""
    device: str = "H100"
    """A GPU by its name: A100, H100, H100 PCIe, H200, L40S, RTX 4090, ..."""
    memory_gb: float = 80.0
    """Of each device."""
    mfu: float = 0.4
    """Share of the device's peak that model FLOPs reach."""
    tokens_per_s: float | None = None
    """Measured on one device, in place of mfu."""
    link_gb_per_s: float = 400.0
    """Between devices, each way: NVLink of an H100 gives some 400, InfiniBand 50 a device."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """By default the preset's."""
    remat: Literal["none", "products", "all"] | None = None
    """By default the preset's."""
    attention: Literal["explicit", "cudnn"] = "cudnn"
    compile: bool = False
    """Compile the step for as many simulated CPU devices, with explicit attention, and say what XLA sets aside."""


def main() -> None:
    args, console = parse(Args, __doc__), Console()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    config, settings = recipe(args.preset).model, recipe(args.preset).settings
    remat = args.remat or recipe(args.preset).remat
    settings = dataclasses.replace(
        settings, accumulate=args.accumulate or settings.accumulate, dtype=args.dtype or settings.dtype
    )
    shape = MeshShape.parse(args.mesh)
    micro = settings.batch_size // settings.accumulate
    shape.check(config, micro)
    tokens_a_step = settings.batch_size * config.n_ctx
    tokens = args.tokens or settings.steps * tokens_a_step
    for name in ("tokens", "memory_gb", "mfu", "link_gb_per_s", "tokens_per_s"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive")

    need = memory(config, shape, micro, settings.dtype, remat, args.attention)
    table = Table("memory of a device", "GB", title=f"{args.preset} over {shape}: {n_params(config):,} parameters")
    for name, size in dataclasses.asdict(need).items():
        table.add_row(name, f"{size / 1e9:.2f}")
    table.add_row("all", f"{need.total / 1e9:.2f}", style="bold")
    console.print(table)
    told = f"{micro} windows of {config.n_ctx} tokens in a micro-batch, {settings.dtype}, {args.attention} attention"
    console.print(f"{told}, remat {remat}", highlight=False)
    if need.total > 0.9e9 * args.memory_gb:
        console.print(
            f"more than 90 % of {args.memory_gb:.0f} GB: raise --accumulate or fsdp, or take --remat products",
            style="yellow",
        )

    speed, source = args.tokens_per_s, "measured"
    if speed is None:
        peak = peak_flops(args.device)
        if peak is None:
            raise InputError(f"--device {args.device}: its peak is not known here; give --tokens-per-s")
        speed = args.mfu * peak / flops_per_token(config)
        source = f"{args.mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s, assumed"
    seconds = tokens_a_step / (speed * shape.size)
    hours = tokens / (speed * shape.size) / 3600
    table = Table("time", "", title=f"{tokens:,.0f} tokens, {tokens / tokens_a_step:,.0f} steps of {tokens_a_step:,}")
    table.add_row("model FLOPs a token, 6N + 12LDT", f"{flops_per_token(config) / 1e9:.3f} GFLOP")
    table.add_row("tokens/s of a device", f"{speed:,.0f} ({source})")
    table.add_row(f"tokens/s of {shape.size} without messages", f"{speed * shape.size:,.0f}")
    table.add_row("a step", f"{seconds:.2f} s")
    table.add_row("all", f"{hours:,.1f} h, {hours * shape.size:,.1f} device hours")
    console.print(table)

    sent = communication_bytes(config, shape, micro, settings.accumulate, settings.dtype)
    if shape.size > 1:
        table = Table("messages of a device and step", "GB", "s, if nothing overlaps")
        for name, size in sent.items():
            table.add_row(name, f"{size / 1e9:.2f}", f"{size / 1e9 / args.link_gb_per_s:.3f}")
        console.print(table)
    wide = 8 if settings.dtype == "float64" else 4
    each = n_params(config) * wide
    console.print(
        f"a checkpoint: {4 * each / 1e9:.1f} GB on the disk, {settings.keep} and the best are kept; "
        f"{tokens * 2 / 1e9:.1f} GB of uint16 tokens if none comes twice",
        highlight=False,
    )

    if args.compile:
        jax.config.update("jax_num_cpu_devices", shape.size)
        found = compiled_memory(config, shape, settings, remat)
        model = memory(config, shape, micro, settings.dtype, remat)
        console.print(
            f"XLA, compiling for {shape.size} CPU devices and explicit attention: {found / 1e9:.2f} GB each; "
            f"the model says {model.total / 1e9:.2f} GB of that",
            highlight=False,
            soft_wrap=True,
        )


if __name__ == "__main__":
    with exit_with_message():
        main()
