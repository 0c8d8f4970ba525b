"""Train a GPT-2 with the torch backend. scripts/train_jax.py is the same in JAX.

python scripts/train_torch.py                                     # small, embedded corpus, any CPU
python scripts/train_torch.py --preset 124M --corpus DIR --device cuda --compile
python scripts/train_torch.py --init 124M --corpus my.txt --steps 500 --lr 3e-5   # fine-tune OpenAI's weights
python scripts/train_torch.py --run runs/NAME --resume            # go on, also with a run of train_jax.py
torchrun --nproc-per-node 8 -- scripts/train_torch.py --preset 124M   # eight GPUs, same losses
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

with exit_with_message():
    from gpt_torch.devices import choose_device, describe
    from gpt_torch.distributed import processes
    from gpt_torch.train import Trainer


@dataclasses.dataclass(frozen=True)
class Args(JobArgs):
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    attention: Literal["explicit", "sdpa"] = "sdpa"
    """The formula as written in the model, or torch's fused kernel."""
    compile: bool = False
    """Use torch.compile."""


def main() -> int:
    args = parse_job_args(Args, __doc__)
    with processes() as these:
        return train(args, these)


def train(args: Args, these: Processes) -> int:
    console, dtype = Console(quiet=not these.first), args.settings.dtype

    # Device
    device = choose_device(args.device)

    # Model, tokenizer and data
    job = load_job(args, these)
    if job.micro_size % these.count:
        raise InputError(
            f"micro-batches of {job.micro_size} windows are not divisible by {these.count} processes; "
            "change --batch-size or --accumulate"
        )

    # Run folder
    wide = "float64" if dtype == "float64" else "float32"
    precision = f"computes in {dtype}, parameters {wide}; attention {args.attention}" + ", compiled" * args.compile
    over = f", {these.count} processes" * (these.count > 1)
    job = start_run(job, "torch", {"device": describe(device) + over, "precision": precision}, console)

    # Train
    trainer = Trainer(job.config, job.settings, job.init, args.attention, device, args.compile, these)
    return resume_and_train(trainer, job, console)


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
