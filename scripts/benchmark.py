"""Measure gpt_jax against what else one could run: peers take turns, each in a process of its own.

    python scripts/benchmark.py train       # a training step; peers: gpt_torch eager and compiled, transformers
    python scripts/benchmark.py generate    # greedy decoding at 124M; peers: transformers, gpt_torch
    python scripts/benchmark.py load        # OpenAI's and transformers' files into a model; peer: transformers
    python scripts/benchmark.py compile     # from nothing to the first step, without and with a compilation cache
    python scripts/benchmark.py options --preset small   # what unroll, remat and accumulate do to a preset's step
    python scripts/benchmark.py prepare     # text to token shards; peers: tiktoken, used plainly
    python scripts/benchmark.py all         # compile, train, generate and load
    python scripts/benchmark.py all --gpu   # the same on a GPU: 124M, 355M and 1558M, 1,024 tokens, bfloat16

Each leaves results.json, results.md and results.png in --out.
"""

import dataclasses
import json
import os
import platform
import shlex
import sys
import tempfile
from collections.abc import Callable
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import numpy as np
import tyro
from measure import peers, report
from measure.report import Measurement
from measure.turns import Figures, Make, alternate, once
from rich.console import Console

from parity import weights
from parity.cli import parse
from parity.config import PRESETS, GPTConfig
from parity.errors import InputError, exit_with_message
from parity.training.flops import flops_per_token, peak_flops
from parity.training.settings import TrainSettings, recipe
from parity.weights import huggingface, openai


@dataclasses.dataclass(frozen=True)
class Args:
    what: tyro.conf.Positional[Literal["train", "generate", "load", "compile", "options", "prepare", "all"]] = "train"
    gpu: bool = False
    """Measure on a GPU, with sizes to match; by default on the CPU."""
    preset: str | None = None
    """Of train, compile and options: this preset's model and batch in place of the benchmark's own."""
    batch_size: int | None = None
    """Of train, compile and options: windows in a step, in one micro-batch."""
    size: Literal["124M", "355M", "774M", "1558M"] = "124M"
    """Of generate and load."""
    rounds: int = 5
    calls: int = 3
    """Steps of each peer in a round; one round before them warms up and does not count."""
    threads: int = 0
    """Threads of torch; by default as many as this process has cores. XLA takes them all."""
    peers: tuple[str, ...] = ()
    """Measure only those with one of these in their name, and the first."""
    vocab_bpe: Path | None = None
    """Of prepare: OpenAI's vocab.bpe; by default the one in the cache."""
    out: Path | None = None
    """Folder for the results; by default a new one in runs/."""
    cache: tyro.conf.Suppress[Path] = Path()
    """Folder of caches of compiled programs, for the time of a benchmark."""

    def environment(self, cache: Path | None = None) -> dict[str, str]:
        """Of a peer's process. `cache`: where compiled programs are kept and looked for; by default one for all."""
        cache = cache or self.cache / "0"
        if self.gpu:
            found = {"MEASURE_ON": "gpu", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}  # the peers share its memory
        else:
            found = {"MEASURE_ON": "cpu", "JAX_PLATFORMS": "cpu", "CUDA_VISIBLE_DEVICES": ""}
        return {
            **found,
            "JAX_COMPILATION_CACHE_DIR": str(cache / "jax"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "TORCHINDUCTOR_CACHE_DIR": str(cache / "torch"),
            "TRITON_CACHE_DIR": str(cache / "triton"),
        }

    def make(self, maker: Callable, *arguments: Any, cache: Path | None = None) -> Make:
        return maker, arguments, self.environment(cache)

    def wanted(self, makers: dict[str, Make]) -> dict[str, Make]:
        first = next(iter(makers))
        chosen = {
            name: make
            for name, make in makers.items()
            if name == first or not self.peers or any(part in name for part in self.peers)
        }
        if unknown := [part for part in self.peers if not any(part in name for name in makers)]:
            raise InputError(f"--peers: no {', '.join(unknown)} among {'; '.join(makers)}")
        return chosen


def job(args: Args, name: str = "124M") -> tuple[str, GPTConfig, TrainSettings]:
    """Title, model and settings of a step, its vocabulary padded as nanoGPT's."""
    if args.preset is not None:
        config, settings = recipe(args.preset).model, recipe(args.preset).settings
        title = args.preset
    elif args.gpu:
        config = dataclasses.replace(PRESETS[name], n_vocab=50304)
        size = {"124M": 32, "355M": 16, "774M": 8, "1558M": 8}[name]
        title, settings = name, TrainSettings(batch_size=size, accumulate=1)
    else:
        config = GPTConfig(n_vocab=50304, n_ctx=256, n_embd=384, n_head=6, n_layer=6)
        title, settings = "6 layers", TrainSettings(batch_size=4, accumulate=1, dtype="float32")
    if args.batch_size is not None:
        settings = dataclasses.replace(settings, batch_size=args.batch_size, accumulate=1)
    told = f"{title}, {weights.n_params(config):,} parameters, V={config.n_vocab}, "
    told += f"B={settings.batch_size}, T={config.n_ctx}, {settings.dtype}"
    return told, config, settings


def train(args: Args) -> list[Measurement]:
    measurements = [_steps(args, "124M", with_peers=True)]
    if args.gpu and args.preset is None:
        measurements += [_steps(args, name, with_peers=False) for name in ("355M", "1558M")]
    return measurements


def _steps(args: Args, name: str, with_peers: bool) -> Measurement:
    told, config, settings = job(args, name)
    options = recipe(args.preset or name)
    unroll, remat = (options.unroll, options.remat) if args.gpu or args.preset else (1, "none")
    ours: dict[str, Make] = {"gpt_jax": args.make(peers.jax_step, config, settings, unroll, remat)}
    theirs: dict[str, Make] = {
        "gpt_torch, eager": args.make(peers.torch_step, config, settings, False, args.threads),
        "gpt_torch, compiled": args.make(peers.torch_step, config, settings, True, args.threads),
        "transformers, eager": args.make(peers.transformers_step, config, settings, args.threads),
    }
    makers = args.wanted({**ours, **(theirs if with_peers else {})})
    products = None if args.gpu else args.make(peers.products)
    found, meter = alternate(makers, args.rounds, args.calls, products)
    tokens = settings.batch_size * config.n_ctx
    flops = flops_per_token(config) * tokens / found["gpt_jax"].median
    if meter.seconds:
        most = peers.PRODUCT_FLOPS / meter.median
        source = f"that a product of two {peers.PRODUCT_SIZE} x {peers.PRODUCT_SIZE} matrices reaches"
    else:
        most, source = peak_flops(found["gpt_jax"].device), f"of an {found['gpt_jax'].device}"
    fact = f"Model FLOPs, 6N + 12LDT a token: {flops / 1e12:.3f} TFLOP/s"
    if most is not None:
        fact += f", {flops / most:.1%} of the {most / 1e12:,.2f} {source}"
    return Measurement(f"A training step: {told}", "step", tokens, "tokens", found, [fact])


def generate(args: Args) -> list[Measurement]:
    """One row, several rows, and the first token after a long prompt."""
    config = PRESETS[args.size]
    dtype = "bfloat16" if args.gpu else "float32"
    many = 32 if args.gpu else 8
    measurements = []
    for B, P, new in ((1, 16, 64), (many, 16, 64), (1, 512, 1)):
        rows = np.random.default_rng(0).integers(0, config.n_vocab, (B, P)).tolist()
        makers = {
            "gpt_jax": args.make(peers.jax_generation, config, rows, new, dtype),
            "transformers": args.make(peers.transformers_generation, config, rows, new, dtype, args.threads),
            "gpt_torch": args.make(peers.torch_generation, config, rows, new, dtype, args.threads),
        }
        if not args.gpu:
            makers["gpt_jax, bfloat16"] = args.make(peers.jax_generation, config, rows, new, "bfloat16")
        reads = args.make(peers.memory_reads, args.threads)
        found, meter = alternate(args.wanted(makers), args.rounds, 1, reads)
        bandwidth = peers.READ_BYTES / meter.median
        # Every weight but the position table's is read once a step; the cache comes on top and is not counted.
        itemsize = 2 if args.gpu else 4
        read = itemsize * (weights.n_params(config) - config.n_ctx * config.n_embd) * new / found["gpt_jax"].median
        told = f"{args.size}, {dtype}, batch {B}, prompt {P}, {new} new"
        facts = [f"Memory reads {bandwidth / 1e9:.1f} GB/s; gpt_jax's weights alone are {read / bandwidth:.0%} of that"]
        measurements.append(
            Measurement(f"Greedy decoding: {told}", "call", B * new, "tokens", found, facts if new > 1 else [])
        )
    return measurements


def load(args: Args) -> list[Measurement]:
    """Random weights of a full shape, in the page cache; each load in a new process, imports not counted."""
    config = PRESETS[args.size]
    size = 4 * weights.n_params(config)
    measurements = []
    with tempfile.TemporaryDirectory() as name:
        folders = {"openai": Path(name) / "openai", "huggingface": Path(name) / "huggingface"}
        arrays = weights.initial_weights(config, seed=0)
        for folder in folders.values():
            folder.mkdir()
        openai.write(folders["openai"], config, dict(weights.convert(arrays, "huggingface", "openai", config)))
        huggingface.write(folders["huggingface"], config, arrays)
        del arrays
        for kind, folder in folders.items():
            makers = {
                "gpt_jax": args.make(peers.jax_loaded, folder),
                "gpt_torch": args.make(peers.torch_loaded, folder),
            }
            if kind == "huggingface":
                makers["transformers"] = args.make(peers.transformers_loaded, folder)
            found = once(args.wanted(makers), args.rounds)
            told = f"{args.size} from {kind}'s files, {size / 1e6:,.0f} MB"
            measurements.append(Measurement(f"Loading: {told}", "load", size / 1e6, "MB", found))
    return measurements


def compile(args: Args) -> list[Measurement]:
    """Weights drawn, program compiled, one step done: without a compilation cache, and with what the first left."""
    told, config, settings = job(args)
    makers: dict[str, tuple] = {
        "gpt_jax, unrolled": (peers.jax_step, config, settings, config.n_layer, "none"),
        "gpt_jax, scanned": (peers.jax_step, config, settings, 1, "none"),
        "gpt_torch, compiled": (peers.torch_step, config, settings, True, args.threads),
    }
    if args.gpu:
        del makers["gpt_jax, scanned"]  # a cold start takes minutes there
    found: dict[str, list[Figures]] = {}
    for number in range(1 if args.gpu else min(args.rounds, 2)):
        for state in ("cold", "warm"):  # the first cache also serves what is measured afterwards
            cache = args.cache / str(number)
            turn = {f"{peer}, {state}": args.make(*made, cache=cache) for peer, made in makers.items()}
            for peer, figures in once(args.wanted(turn), 1).items():
                found.setdefault(peer, []).append(figures)
    figures_of = {peer: Figures.of(runs) for peer, runs in found.items()}
    return [Measurement(f"From nothing to the first step: {told}", "start", 1, "starts", figures_of)]


def options(args: Args) -> list[Measurement]:
    """A preset's step with each of its options, by the one that it has by default."""
    told, config, settings = job(args)
    cases: dict[str, tuple] = {}
    for unroll in sorted({1, 2, config.n_layer}):
        for remat in ("none", "products", "all"):
            if remat == "none" or unroll in (1, config.n_layer):
                cases[f"unroll {unroll}, remat {remat}"] = (settings, unroll, remat)
    for accumulate in (1, 2, 4):
        if accumulate != settings.accumulate and settings.batch_size % accumulate == 0:
            parts = dataclasses.replace(settings, accumulate=accumulate)
            cases[f"unroll 1, accumulate {accumulate}"] = (parts, 1, "none")
    makers = {name: args.make(peers.jax_step, config, *case) for name, case in cases.items()}
    found, _ = alternate(args.wanted(makers), args.rounds, args.calls)
    return [Measurement(f"Options: {told}", "step", settings.batch_size * config.n_ctx, "tokens", found)]


def prepare(args: Args) -> list[Measurement]:
    """Python's documentation, twenty times over, as JSONL: to shards on the disk, or to arrays in memory."""
    texts = [topics[name] for name in sorted(topics)] * 20
    threads = args.threads
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "topics.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
        makers = args.wanted(
            {
                f"prepare_data.py, {threads} workers": args.make(
                    peers.prepared, source, Path(folder) / "out", args.vocab_bpe, threads
                ),
                "tiktoken, one text after another": args.make(peers.tokenized, source, args.vocab_bpe, 1),
                f"tiktoken, its batches on {threads} threads": args.make(
                    peers.tokenized, source, args.vocab_bpe, threads
                ),
            }
        )
        found, _ = alternate(makers, args.rounds, 1)
        index = json.loads((Path(folder) / "out" / "index.json").read_text())
    tokens = sum(shard["tokens"] for split in index["splits"].values() for shard in split["done"])
    return [Measurement(f"Tokenizing {tokens:,} tokens of JSONL", "pass", tokens, "tokens", found)]


def main() -> None:
    args, console = parse(Args, __doc__), Console()
    if not console.is_terminal:
        console.width = 110
    args = dataclasses.replace(args, threads=args.threads or len(os.sched_getaffinity(0)))
    for name in ("rounds", "calls", "batch_size"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(args, name)}")
    kinds = {"train": train, "generate": generate, "load": load, "compile": compile}
    kinds |= {"options": options, "prepare": prepare}
    chosen = ["compile", "train", "generate", "load"] if args.what == "all" else [args.what]
    out = args.out or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-benchmark-{args.what}"
    command = shlex.join(["python", "scripts/benchmark.py", *sys.argv[1:]])
    measurements: list[Measurement] = []
    with tempfile.TemporaryDirectory() as cache:
        for kind in chosen:
            for measurement in kinds[kind](dataclasses.replace(args, cache=Path(cache))):
                measurement.show(console)
                measurements.append(measurement)
                report.write(out, command, machine(), measurements)
    console.print(f"written to {out}", highlight=False)


def machine() -> str:
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    packages = ", ".join(f"{name} {version(name)}" for name in ("jax", "torch", "transformers"))
    return f"{len(os.sched_getaffinity(0))} cores of {model}, Python {platform.python_version()}, {packages}"


if __name__ == "__main__":
    with exit_with_message():
        main()
