"""Train a GPT-2 with the JAX backend. scripts/train_torch.py is the same in PyTorch.

python scripts/train_jax.py                                       # small, embedded corpus, any CPU
python scripts/train_jax.py --preset 124M --corpus DIR --device gpu
python scripts/train_jax.py --init 124M --corpus my.txt --steps 500 --lr 3e-5   # fine-tune OpenAI's weights
python scripts/train_jax.py --run runs/NAME --resume              # go on, also with a run of train_torch.py
"""

import dataclasses
import sys
from typing import Literal

from rich.console import Console

from parity.errors import InputError, exit_with_message
from parity.training.args import JobArgs, parse_job_args
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.processes import Processes
from parity.training.settings import recipe

with exit_with_message():
    import jax

    from gpt_jax.devices import choose_attention, choose_device, describe
    from gpt_jax.distributed import processes
    from gpt_jax.sharding import MeshShape, make_mesh
    from gpt_jax.train import Trainer


@dataclasses.dataclass(frozen=True)
class Args(JobArgs):
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    attention: Literal["auto", "explicit", "cudnn"] = "auto"
    unroll: int | None = None
    """Layers written out in the compiled program, by default as the preset has it; more compile longer."""
    remat: Literal["none", "products", "all"] | None = None
    """What a gradient computes again instead of keeping it in memory: all but matrix products, or all; by default
    as the preset has it."""
    mesh: str | None = None
    """Devices to divide model and batches over, data=2,fsdp=2,tensor=2 say; by default one device, or for several
    processes data=ALL."""
    distributed: bool = False
    """One of several processes that SLURM, Open MPI or Kubernetes started; JAX finds the others."""
    coordinator: str | None = None
    """Without them: HOST:PORT at which the first process is to be found,"""
    num_processes: int | None = None
    """how many there are,"""
    process_id: int | None = None
    """and which this one is, from 0."""


def main() -> int:
    args = parse_job_args(Args, __doc__)
    with processes(args.distributed, args.coordinator, args.num_processes, args.process_id) as these:
        return train(args, these)


def train(args: Args, these: Processes) -> int:
    console, dtype = Console(quiet=not these.first), args.settings.dtype
    if args.unroll is not None and args.unroll < 1:
        raise InputError(f"--unroll must be at least 1, got {args.unroll}")

    # Device
    device = choose_device(args.device)
    jax.config.update("jax_default_device", device)
    jax.config.update("jax_enable_x64", dtype == "float64")

    # Model, tokenizer and data
    job = load_job(args, these)
    attention = choose_attention(args.attention, device, dtype, job.config.drop_rate)

    # Mesh
    mesh, over = None, ""
    if args.mesh is not None or these.count > 1:
        shape = MeshShape(jax.device_count()) if args.mesh is None else MeshShape.parse(args.mesh)
        shape.check(job.config, job.micro_size)
        mesh, over = make_mesh(shape, device.platform), f", {shape.size} of them: {shape}"
        over += f" in {these.count} processes" * (these.count > 1)

    # Run folder
    wide = "float64" if dtype == "float64" else "float32"
    precision = f"computes in {dtype}, parameters {wide}; attention {attention}"
    unroll = min(args.unroll or recipe(args.preset).unroll, job.config.n_layer)
    remat = args.remat or recipe(args.preset).remat
    program = f"layers written out {unroll}, computed again for gradients: {remat}"
    about = {"device": describe(device) + over, "precision": precision, "program": program}
    job = start_run(job, "jax", about, console)

    # Train
    trainer = Trainer(job.config, job.settings, job.init, attention, unroll, mesh, remat)
    return resume_and_train(trainer, job, console)


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
