"""Measure gpt_jax and its alternatives in turn, each in a process of its own.

    python scripts/benchmark.py train       # a training step; peers: gpt_torch eager and compiled, transformers
    python scripts/benchmark.py profile     # a training step of gpt_jax by kind of operation
    python scripts/benchmark.py run         # nanoGPT's training run for a CPU, by parts; peer: nanoGPT's step
    python scripts/benchmark.py run --whole # the same, and then both runs from their start to their end
    python scripts/benchmark.py generate    # greedy decoding at 124M; peers: transformers, gpt_torch,
                                            # CTranslate2; and a file of prompts
    python scripts/benchmark.py load        # weights from files into a model; peers: gpt_torch, transformers
    python scripts/benchmark.py compile     # start to first step, without and with a filled compilation cache
    python scripts/benchmark.py start       # whole processes of train_jax.py and generate.py, cold and warm
    python scripts/benchmark.py options --preset small   # effect of unroll, remat and accumulate on a preset's step
    python scripts/benchmark.py prepare     # text to token shards; peer: plain tiktoken
    python scripts/benchmark.py evaluate    # log-probabilities of texts; peer: lm-evaluation-harness with transformers
    python scripts/benchmark.py lora        # a training step of adapters; peer: peft with transformers
    python scripts/benchmark.py batching    # tuning on examples: padded to buckets or to the longest, or packed
    python scripts/benchmark.py serve       # the server and clients; peers: one client, transformers serve
    python scripts/benchmark.py all         # compile, train, generate and load
    python scripts/benchmark.py all --gpu   # the same on a GPU: 124M, 355M and 1558M, 1,024 tokens, bfloat16

Each command writes results.json and results.md into the folder --out.
"""

import dataclasses
import shlex
import sys
import tempfile
from datetime import datetime
from pathlib import Path

from measure import machine, report
from measure.args import Args, What
from measure.benchmarks import ALL, BENCHMARKS
from measure.report import Measurement

from parity.cli import changed_options, parse
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.parts import usable_cores

# The options that not every benchmark uses, with those that do.
USED_BY: dict[str, tuple[What, ...]] = {
    "--preset": ("train", "profile", "run", "compile", "options", "lora", "batching"),
    "--batch-size": ("train", "profile", "compile", "options", "lora"),
    "--size": ("generate", "load", "evaluate", "lora", "batching", "serve"),
    "--calls": ("train", "profile", "run", "options", "lora", "batching"),
    "--peers": ("train", "generate", "load", "compile", "options", "prepare", "evaluate", "lora", "serve"),
    "--whole": ("run",),
    "--items": ("evaluate",),
    "--clients": ("serve",),
    "--seconds": ("serve",),
    "--vocab-bpe": ("prepare", "serve"),
}


def main() -> None:
    args, console = parse(Args, __doc__), PlainConsole(lossy=True)
    names = ALL if args.what == "all" else (args.what,)
    for option in changed_options(args, Args(what=args.what)):
        if option in USED_BY and not set(names) & set(USED_BY[option]):
            raise InputError(f"{option} is not for {args.what}; it is for {', '.join(USED_BY[option])}")
    if args.items < 4 or args.items % 4:
        raise InputError(f"--items must be a multiple of 4, which HellaSwag has per question; got {args.items}")
    if not console.is_terminal:
        console.width = 110
    args = dataclasses.replace(args, threads=args.threads or usable_cores())
    for name in ("rounds", "calls", "batch_size", "threads"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    out = args.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-benchmark-{args.what}"
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as cache:
        args = dataclasses.replace(args, cache=Path(cache))
        facts = machine.describe()
        peaks = [machine.peaks(args)] if args.what == "all" and not args.gpu else []
        for name in names:
            for measurement in BENCHMARKS[name](args):
                measurement = dataclasses.replace(measurement, notes=[*measurement.notes, *peaks])
                measurement.show(console)
                measurements.append(measurement)
                report.write(out, command, facts, measurements)
    console.print(f"results are in {out}")


if __name__ == "__main__":
    with exit_with_message():
        main()
