"""Estimate what a training run on GPUs needs: memory per device, time, communication and disk space.

    python scripts/plan.py --preset 1558M --mesh fsdp=8 --accumulate 5 --tokens 10e9
    python scripts/plan.py --preset 124M-fineweb-edu --mesh data=8 --tokens 10e9
    python scripts/plan.py --preset 124M --tokens-per-s 500000          # measured by benchmark.py train --gpu
    python scripts/plan.py --preset 1558M --lora-rank 16                 # adapters in place of the whole model
    python scripts/plan.py --preset 124M --compile-for H100             # asks XLA, which needs no GPU for it
    python scripts/plan.py --preset 1558M --mesh fsdp=8 --accumulate 30 --compile --dtype float32   # for simulated CPUs

The estimate of memory is fitted to what XLA reports for compiled steps (gpt_jax/memory.py). The time is computed from
--mfu, the fraction of the device's peak rate that training is assumed to reach, or from a measured speed.
"""

import dataclasses
import math
import time
from pathlib import Path
from typing import Literal

from rich.table import Table

from parity.cli import parse
from parity.config import GPTConfig
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.training.flops import UTILIZATION, flops_per_token, peak_flops
from parity.training.settings import TrainSettings, recipe
from parity.weights import n_params
from parity.weights.adapters import LoraConfig, n_adapter_params

with exit_with_message():
    import jax

    from gpt_jax import hlo, roofline
    from gpt_jax.gpu_targets import COMPILER_OPTIONS, GPUS, target
    from gpt_jax.lowering import StepOptions, lower_train_step, memory_bytes
    from gpt_jax.memory import communication_bytes, memory
    from gpt_jax.micro_batches import RESERVED, USABLE, possible_numbers
    from gpt_jax.sharding import MeshShape, make_mesh


@dataclasses.dataclass(frozen=True)
class Args:
    preset: str = "124M"
    """Preset of train_jax.py; it gives the model, the batch and the values of the options that are left out."""
    mesh: str = "data=1"
    """Number of devices along each axis of the mesh, as in train_jax.py: data=2,fsdp=2,tensor=2 for example."""
    accumulate: int | None = None
    """Number of micro-batches per step; by default the smallest whose estimate fits the part of the memory that JAX
    reserves, as train_jax.py chooses it on a GPU."""
    tokens: float | None = None
    """Number of tokens to train on; by default those of the preset's steps."""
    device: str | None = None
    """Name of the GPU, which gives its peak rate: A100, H100, H100 PCIe, H200, L40S, RTX 4090, ... By default that of
    --compile-for, or H100."""
    memory_gb: float | None = None
    """Memory of each device in GB; by default 85 for an H100, 151 for an H200, and 80 for any other."""
    mfu: float = UTILIZATION
    """Assumed model FLOPs utilization: the fraction of the device's peak that training reaches."""
    tokens_per_s: float | None = None
    """Measured speed of one device in tokens per second; by default it is estimated from --device and --mfu."""
    link_gb_per_s: float = 400.0
    """Bandwidth between devices in each direction, in GB per second: about 400 with an H100's NVLink."""
    dtype: Literal["float32", "bfloat16", "float64"] | None = None
    """Dtype of the computation; by default the preset's."""
    remat: Literal["none", "products", "all"] = "none"
    """What the backward pass recomputes, as in train_jax.py."""
    unroll: int | None = None
    """With --compile-for or --compile, number of layers per iteration of the compiled loop over layers, as in
    train_jax.py; by default all of them, and 1 with --compile."""
    attention: Literal["explicit", "cudnn"] = "cudnn"
    """Attention implementation: cuDNN's fused kernel (cudnn) or the formula of the model file (explicit), which also
    stores the attention patterns."""
    lora_rank: int | None = None
    """Rank of LoRA adapters on all linear layers, which are trained in place of the model; the estimates of memory and
    disk space are theirs. By default the whole model is trained."""
    compile: bool = False
    """Also compile the step for simulated CPU devices, with explicit attention, and print the memory XLA reports."""
    compile_for: Literal["H100", "H200"] | None = None
    """Also compile the step for GPUs of this kind, which need not be present, and print what XLA made of it: memory,
    kernels, messages, and an estimate of the time. Requires the extra cuda13."""
    hlo: Path | None = None
    """File to which --compile-for writes the text of the compiled program."""


@dataclasses.dataclass(frozen=True)
class Plan:
    """The run that the options describe."""

    args: Args
    config: GPTConfig
    settings: TrainSettings
    shape: MeshShape
    device: str
    memory_bytes: float
    """Memory of each device."""

    @property
    def lora(self) -> LoraConfig | None:
        return None if self.args.lora_rank is None else LoraConfig(rank=self.args.lora_rank)

    @property
    def usable_bytes(self) -> float:
        return USABLE * RESERVED * self.memory_bytes

    def memory(self, micro_size: int | None = None):
        micro_size = micro_size or self.settings.micro_size
        options = self.settings.dtype, self.args.remat, self.args.attention
        return memory(self.config, self.shape, micro_size, *options, lora=self.lora)


def main() -> None:
    args, console = parse(Args, __doc__), PlainConsole()
    jax.config.update("jax_platforms", "cpu")  # nothing is computed
    plan = _plan(args)
    _print_memory(plan, console)
    _print_time(plan, console)
    if plan.shape.size > 1:
        _print_communication(plan, console)
    _print_disk(plan, console)
    if args.compile:
        _compile(plan, console)
    if args.compile_for is not None:
        _compile_for(plan, args.compile_for, console)


def _plan(args: Args) -> Plan:
    if args.lora_rank is not None and (args.compile or args.compile_for is not None):
        raise InputError("--lora-rank is estimated only; leave out --compile and --compile-for")
    for name in ("tokens", "memory_gb", "mfu", "link_gb_per_s", "tokens_per_s"):
        value, most = getattr(args, name), 1 if name == "mfu" else math.inf
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            limits = "between 0 and 1" if most == 1 else "positive"
            raise InputError(f"--{name.replace('_', '-')} must be {limits}, got {value}")
    if args.unroll is not None and args.unroll < 1:
        raise InputError(f"--unroll must be at least 1, got {args.unroll}")
    if args.unroll is not None and not args.compile and args.compile_for is None:
        raise InputError("--unroll is for --compile and --compile-for; the estimates do not depend on it")
    if args.hlo is not None and args.compile_for is None:
        raise InputError("--hlo is for --compile-for, which compiles the program that it writes")
    if args.tokens_per_s is not None and args.mfu != UTILIZATION:
        raise InputError("--tokens-per-s replaces --mfu; give one of them")
    preset, shape = recipe(args.preset), MeshShape.parse(args.mesh)
    settings = dataclasses.replace(preset.settings, dtype=args.dtype or preset.settings.dtype)
    device = args.device or args.compile_for or "H100"
    known = GPUS[device].memory_bytes if device in GPUS else 80e9
    plan = Plan(args, preset.model, settings, shape, device, args.memory_gb * 1e9 if args.memory_gb else known)
    accumulate = args.accumulate
    if accumulate is None:
        numbers = possible_numbers(settings.batch_size, shape)
        fitting = (n for n in numbers if plan.memory(settings.batch_size // n).total <= plan.usable_bytes)
        accumulate = next(fitting, numbers[-1])
    plan = dataclasses.replace(plan, settings=dataclasses.replace(settings, accumulate=accumulate))
    shape.check(plan.config, plan.settings.micro_size)
    return plan


def _print_memory(plan: Plan, console: PlainConsole) -> None:
    args, settings, estimate = plan.args, plan.settings, plan.memory()
    title = f"{args.preset} over {plan.shape}: {n_params(plan.config):,} parameters"
    if plan.lora is not None:
        title += f", {n_adapter_params(plan.config, plan.lora):,} more in adapters, which are trained"
    table = Table("memory per device", "GB", title=title)
    for name, size in dataclasses.asdict(estimate).items():
        table.add_row(name.replace("_", " "), f"{size / 1e9:.2f}")
    table.add_row("total", f"{estimate.total / 1e9:.2f}", style="bold")
    console.print(table)
    console.print(
        f"--accumulate {settings.accumulate}: {settings.micro_size} windows of {plan.config.n_ctx} tokens per "
        f"micro-batch, {settings.dtype}, {args.attention} attention, remat {args.remat}",
        soft_wrap=True,
    )
    if estimate.total > plan.usable_bytes:
        console.print(
            f"This is more than fits the {RESERVED:.0%} that JAX reserves of {plan.memory_bytes / 1e9:.0f} GB: raise "
            "--accumulate or fsdp, use --remat all, or train with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95",
            style="yellow",
            soft_wrap=True,
        )


def _print_time(plan: Plan, console: PlainConsole) -> None:
    n_devices, tokens_per_step = plan.shape.size, plan.settings.batch_size * plan.config.n_ctx
    tokens = plan.args.tokens or plan.settings.steps * tokens_per_step
    speed, source = _tokens_per_s(plan)
    hours = tokens / (speed * n_devices) / 3600
    title = f"{tokens:,.0f} tokens, {tokens / tokens_per_step:,.0f} steps of {tokens_per_step:,}"
    table = Table("time", "", title=title)
    table.add_row("model FLOPs per token, 6N + 12LDT", f"{flops_per_token(plan.config) / 1e9:.3f} GFLOP")
    table.add_row("tokens/s per device", f"{speed:,.0f} ({source})")
    table.add_row(f"tokens/s of {n_devices} without communication", f"{speed * n_devices:,.0f}")
    table.add_row("time per step", f"{tokens_per_step / (speed * n_devices):.2f} s")
    table.add_row("total", f"{hours:,.1f} h, {hours * n_devices:,.1f} device hours")
    console.print(table)


def _tokens_per_s(plan: Plan) -> tuple[float, str]:
    """Return the speed of one device, and where the figure comes from."""
    if plan.args.tokens_per_s is not None:
        return plan.args.tokens_per_s, "measured"
    peak = peak_flops(plan.device)
    if peak is None:
        raise InputError(f"--device {plan.device}: its peak rate is unknown; give --tokens-per-s")
    mfu = plan.args.mfu
    return mfu * peak / flops_per_token(plan.config), f"assuming {mfu:.0%} of {peak / 1e12:,.0f} TFLOP/s"


def _print_communication(plan: Plan, console: PlainConsole) -> None:
    table = Table("communication per device and step", "GB", "s without overlap")
    for name, size in _communication(plan).items():
        table.add_row(name, f"{size / 1e9:.2f}", f"{size / 1e9 / plan.args.link_gb_per_s:.3f}")
    console.print(table)


def _communication(plan: Plan) -> dict[str, int]:
    settings = plan.settings
    n_micro_batches = settings.batch_size // settings.micro_size
    return communication_bytes(plan.config, plan.shape, settings.micro_size, n_micro_batches, settings.dtype)


def _print_disk(plan: Plan, console: PlainConsole) -> None:
    settings = plan.settings
    tokens = plan.args.tokens or settings.steps * settings.batch_size * plan.config.n_ctx
    # A checkpoint contains what is trained, its two moments, and model.safetensors or the adapter.
    trained = n_params(plan.config) if plan.lora is None else n_adapter_params(plan.config, plan.lora)
    checkpoint = 4 * trained * (8 if settings.dtype == "float64" else 4)
    console.print(
        f"disk: {checkpoint / 1e9:.3g} GB per checkpoint, of which the newest {settings.keep} and the best are kept; "
        f"{tokens * 2 / 1e9:.1f} GB of uint16 tokens if no token is used twice",
        soft_wrap=True,
    )


def _compile(plan: Plan, console: PlainConsole) -> None:
    config, shape, settings, args = plan.config, plan.shape, plan.settings, plan.args
    jax.config.update("jax_num_cpu_devices", shape.size)
    options = StepOptions("explicit", args.unroll or 1, args.remat)
    compiled = memory_bytes(lower_train_step(config, settings, options, make_mesh(shape)).compile())
    estimate = memory(config, shape, settings.micro_size, settings.dtype, args.remat, "explicit", "cpu")
    console.print(
        f"XLA reports {compiled / 1e9:.2f} GB per device for {shape.size} CPU devices and explicit attention; "
        f"the estimate is {estimate.total / 1e9:.2f} GB",
        soft_wrap=True,
    )


def _compile_for(plan: Plan, gpu: str, console: PlainConsole) -> None:
    """Compile the step for GPUs that need not be present, and print what XLA made of it."""
    config, shape, settings, args = plan.config, plan.shape, plan.settings, plan.args
    options = StepOptions(args.attention, args.unroll or config.n_layer, args.remat)
    began = time.perf_counter()
    compiled = lower_train_step(config, settings, options, target(gpu, shape)).compile(COMPILER_OPTIONS)
    seconds = time.perf_counter() - began
    text, analysis = compiled.as_text() or "", compiled.memory_analysis()
    if args.hlo is not None:
        args.hlo.write_text(text, encoding="utf-8")
    reading = roofline.read(hlo.parse(text), gpu, shape.size)

    title = f"the step as compiled for {shape.size} {gpu}, per device"
    table = Table("kernels", "calls", "TFLOP", "GB", "ms, estimated", title=title)
    for messages in (False, True):
        for name in reading.categories(messages):
            total = reading.total(name, messages)
            flops = f"{total.flops / 1e12:.2f}" if total.flops else ""
            cells = f"{total.calls:,}", flops, f"{total.nbytes / 1e9:.2f}", f"{total.seconds * 1e3:.1f}"
            table.add_row(name, *cells)
        table.add_section()
    console.print(table)

    assert analysis is not None
    needed, not_donated = memory_bytes(compiled), analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    sent = reading.total(None, messages=True).nbytes
    estimated = f"{plan.memory().total / 1e9:.2f} GB estimated above"
    n_layers = f"{config.n_layer} layers x {settings.batch_size // settings.micro_size} micro-batches"
    forward, backward = (reading.calls(name) for name in (roofline.ATTENTION_FORWARD, roofline.ATTENTION_BACKWARD))
    facts = {
        "compiled": f"in {seconds:.0f} s by jax {jax.__version__}; {args.attention} attention, unroll {options.unroll}",
        "memory": f"{needed / 1e9:.2f} GB; {estimated}; {not_donated:,} bytes of results are not the donated state",
        "attention": f"{forward:,} fused calls forward, {backward:,} backward; {n_layers}",
        "products": ", ".join(f"{count:,} {dtypes}" for dtypes, count in reading.products().items()),
        "sent": f"{sent / 1e9:.2f} GB per device; {sum(_communication(plan).values()) / 1e9:.2f} GB estimated above",
        "host": f"{len(reading.transfers)} transfers, {len(reading.host_loops)} loops whose condition it reads",
        "step": _speed(plan, gpu, reading.seconds),
    }
    for name, fact in facts.items():
        console.print(f"{name:<10} {fact}", highlight=False, soft_wrap=True)


def _speed(plan: Plan, gpu: str, seconds: float) -> str:
    tokens = plan.settings.batch_size * plan.config.n_ctx / plan.shape.size
    share = flops_per_token(plan.config) * tokens / seconds / (peak_flops(gpu) or math.inf)
    return (
        f"{seconds:.3f} s, {tokens / seconds:,.0f} tokens/s per device, {share:.1%} of the peak: an estimate from the "
        "program, not a measurement"
    )


if __name__ == "__main__":
    with exit_with_message():
        main()
