"""Train a GPT-2 in JAX. scripts/train_torch.py trains the same model in PyTorch.

python scripts/train_jax.py                                       # the preset small, on Python's documentation
python scripts/train_jax.py --preset 124M --corpus DIR --device gpu
python scripts/train_jax.py --init-from 124M --corpus my.txt --lr 3e-5  # fine-tune OpenAI's model
python scripts/train_jax.py --run runs/NAME --resume              # a run of either training script
"""

import dataclasses
import sys
from typing import Literal

from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.training.args import JobArgs, parse_job_args
from parity.training.flops import estimated_time
from parity.training.job import describe_precision, load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.processes import JoinArgs, Processes
from parity.training.settings import recipe

with exit_with_message():
    import jax

    from gpt_jax.compilation_cache import enable_compilation_cache
    from gpt_jax.devices import choose_attention, choose_device, describe
    from gpt_jax.distributed import processes
    from gpt_jax.lowering import StepOptions
    from gpt_jax.memory import memory
    from gpt_jax.micro_batches import choose_micro_batch, memory_limit
    from gpt_jax.sharding import choose_mesh
    from gpt_jax.train import Trainer


@dataclasses.dataclass(frozen=True)
class Args(JoinArgs, JobArgs):
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu"] = "auto"
    """Kind of device to train on; auto takes the one that JAX prefers, and gpu and cuda mean the same."""
    attention: Literal["auto", "explicit", "cudnn"] = "auto"
    """Attention: the formula as written in the model file (explicit), or cuDNN's fused kernel (cudnn); auto takes cuDNN
    where it can run."""
    unroll: int | None = None
    """Number of layers per iteration of the compiled loop over layers; larger values compile longer. By default all
    layers on a GPU, otherwise the preset's value."""
    remat: Literal["none", "products", "all"] | None = None
    """What the backward pass recomputes instead of keeping it in memory: nothing (none), everything but the results
    of matrix products (products), or everything (all). By default nothing on a GPU, otherwise the preset's value."""
    compilation_cache: bool = True
    """Keep compiled programs in the cache folder, so that the next start with the same options need not compile them.
    A run of several processes keeps them only if JAX_COMPILATION_CACHE_DIR names a folder that all of them share."""
    mesh: str | None = None
    """Number of devices along each axis of the mesh that model and batches are sharded over, for example
    data=2,fsdp=2,tensor=2. By default one device, or data=ALL for a run of several processes."""


def main() -> int:
    args = parse_job_args(Args, __doc__)
    with processes(*args.join_options) as these:
        return train(args, these)


def train(args: Args, these: Processes) -> int:
    console, dtype = PlainConsole(quiet=not these.first, lossy=True), args.settings.dtype
    if args.unroll is not None and args.unroll < 1:
        raise InputError(f"--unroll must be at least 1, got {args.unroll}")

    # Device
    device = choose_device(args.device)
    jax.config.update("jax_default_device", device)
    jax.config.update("jax_enable_x64", dtype == "float64")
    enable_compilation_cache(args.compilation_cache, these.count)

    # Model, tokenizer and data
    job = load_job(args, these)
    attention = choose_attention(args.attention, device, dtype, job.config)

    unroll, remat = recipe(args.preset).program(job.config.n_layer, device.platform)
    unroll, remat = min(args.unroll or unroll, job.config.n_layer), args.remat or remat
    limit = memory_limit(jax.local_devices(backend=device.platform))
    is_gpu_default = args.accumulate_is_default and device.platform == "gpu"
    is_automatic = limit is not None and (is_gpu_default or job.settings.accumulate == "auto")
    micro_size = None if is_automatic else job.micro_size

    # Mesh
    mesh, shape, mesh_info = choose_mesh(args.mesh, job.config, micro_size, device.platform)

    # Micro-batches
    estimates = {}
    if limit is not None:
        config, settings = job.config, job.settings
        if is_automatic:
            options = StepOptions(attention.name, unroll, remat)
            devices = device if mesh is None else mesh
            settings, needed = choose_micro_batch(config, settings, options, devices, limit, these, console.print)
            job = dataclasses.replace(job, settings=settings)
        else:
            kind = settings.dtype, remat, attention.name, device.platform
            needed = memory(config, shape, settings.micro_size, *kind).total
        source = "the compiled step takes" if is_automatic else "the step is estimated to take"
        estimates["memory"] = (
            f"{source} {needed / 1e9:.1f} of {limit / 1e9:.1f} GB, with {job.micro_size} windows per micro-batch "
            f"(--accumulate {settings.accumulate})"
        )
        if time := estimated_time(config, settings, device.device_kind, shape.size):
            estimates["time"] = time

    # Model and optimizer
    trainer = Trainer(job.config, job.settings, job.init_from, attention.name, unroll, mesh, remat)

    # Run folder
    device_info = {
        "device": describe(device) + mesh_info,
        "precision": describe_precision(job.settings, str(attention)),
        "program": f"layers per loop iteration {unroll}; recomputed in the backward pass: {remat}",
        **estimates,
    }
    job = start_run(job, "jax", device_info, console)

    # Train
    return resume_and_train(trainer, job, console)


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
