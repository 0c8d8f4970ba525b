"""Train a GPT-2 in PyTorch. scripts/train_jax.py trains the same model in JAX.

python scripts/train_torch.py                                     # the preset small, on Python's documentation
python scripts/train_torch.py --preset 124M --corpus DIR --device cuda --compile
python scripts/train_torch.py --init-from 124M --corpus my.txt --lr 3e-5  # fine-tune OpenAI's model
python scripts/train_torch.py --run runs/NAME --resume            # a run of either training script
torchrun --nproc-per-node 8 -- scripts/train_torch.py --preset 124M   # eight GPUs, the same losses
"""

import dataclasses
import sys
from typing import Literal

from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.training.args import JobArgs, parse_job_args
from parity.training.job import describe_precision, load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.processes import JOIN_SECONDS, Processes

with exit_with_message():
    from gpt_torch.devices import check_compile, choose_device, describe
    from gpt_torch.distributed import processes
    from gpt_torch.train import Trainer


@dataclasses.dataclass(frozen=True)
class Args(JobArgs):
    device: Literal["auto", "cpu", "gpu", "cuda", "mps"] = "auto"
    """Kind of device to train on; auto takes cuda, mps or cpu, the first that is available, and gpu means cuda."""
    attention: Literal["explicit", "sdpa"] = "sdpa"
    """Attention: the formula as written in the model file (explicit), or torch's fused kernel (sdpa)."""
    compile: bool = False
    """Compile the model with torch.compile: the first step takes longer, later ones less time."""
    join_timeout: float = JOIN_SECONDS
    """Number of seconds that the processes of torchrun wait for each other at the start."""


def main() -> int:
    args = parse_job_args(Args, __doc__)
    with processes(args.join_timeout) as these:
        return train(args, these)


def train(args: Args, these: Processes) -> int:
    console = PlainConsole(quiet=not these.first, lossy=True)

    # Device
    device = choose_device(args.device)
    if args.compile:
        check_compile(device)

    # Model, tokenizer and data
    job = load_job(args, these)
    if job.micro_size % these.count:
        raise InputError(
            f"micro-batches of {job.micro_size} windows are not divisible by {these.count} processes; "
            "change --batch-size or --accumulate"
        )

    # Model and optimizer
    trainer = Trainer(job.config, job.settings, job.init_from, args.attention, device, args.compile, these)

    # Run folder
    precision = describe_precision(job.settings, args.attention) + ", compiled" * args.compile
    processes_info = f", {these.count} processes" * (these.count > 1)
    job = start_run(job, "torch", {"device": describe(device) + processes_info, "precision": precision}, console)

    # Train
    return resume_and_train(trainer, job, console)


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
