"""Train a GPT-2 with the JAX backend. scripts/train_torch.py is the same in PyTorch.

python scripts/train_jax.py                                       # small, embedded corpus, any CPU
python scripts/train_jax.py --preset 124M --corpus DIR --device gpu
python scripts/train_jax.py --init 124M --corpus my.txt --steps 500 --lr 3e-5   # fine-tune OpenAI's weights
python scripts/train_jax.py --run runs/NAME --resume              # go on, also with a run of train_torch.py
"""

import dataclasses
import sys
from typing import Literal

import jax
from rich.console import Console

from gpt_jax.devices import choose_attention, choose_device, describe
from gpt_jax.sharding import MeshShape, make_mesh
from gpt_jax.train import Trainer
from parity.errors import exit_with_message
from parity.fit import run
from parity.job import JobArgs, begin, load, parse


@dataclasses.dataclass(frozen=True)
class Args(JobArgs):
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    attention: Literal["auto", "explicit", "cudnn"] = "auto"
    unroll: int = 1
    """Layers written out in the compiled program; more compiles longer and may run faster."""
    remat: Literal["none", "products", "all"] = "none"
    """What a gradient computes again instead of keeping it in memory: all but matrix products, or all."""
    mesh: str | None = None
    """Devices to divide model and batches over, data=2,fsdp=2,tensor=2 say; by default one device."""


def main() -> int:
    args, console = parse(Args, __doc__), Console()
    dtype = args.settings.dtype

    # Device
    device = choose_device(args.device)
    jax.config.update("jax_default_device", device)
    jax.config.update("jax_enable_x64", dtype == "float64")

    # Model, tokenizer and data
    job = load(args)
    attention = choose_attention(args.attention, device, dtype, job.config.drop_rate)

    # Mesh
    mesh, over = None, ""
    if args.mesh is not None:
        shape = MeshShape.parse(args.mesh)
        shape.check(job.config, job.micro_size)
        mesh, over = make_mesh(shape, device.platform), f", {shape.size} of them: {args.mesh}"

    # Run folder
    wide = "float64" if dtype == "float64" else "float32"
    precision = f"computes in {dtype}, parameters {wide}; attention {attention}"
    job = begin(job, "jax", {"device": describe(device) + over, "precision": precision}, console)

    # Train
    unroll = min(args.unroll, job.config.n_layer)
    trainer = Trainer(job.config, job.settings, job.init, attention, unroll, mesh, args.remat)
    return run(trainer, job, console)


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
