"""The benchmarks: the peers and the workload of each, and the notes below its table."""

import dataclasses
import json
import math
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

from measure import adapters, batching, ct2, operations, peers, prompt_files, scoring, serving, starting
from measure.args import Args
from measure.report import Measurement
from measure.timing import Spec, Timings, first_calls, interleave
from measure.whole_run import TWO_DEVICES, run
from parity import weights
from parity.config import PRESETS, GPTConfig
from parity.errors import InputError
from parity.training.flops import flops_per_token, peak_flops
from parity.training.settings import TrainSettings, recipe
from parity.weights import huggingface, openai


def _training_work(args: Args, name: str = "124M") -> tuple[str, GPTConfig, TrainSettings]:
    """Return description, model and settings of a training step; the vocabulary is padded to 50,304, as in nanoGPT."""
    if args.preset is not None:
        config, settings = recipe(args.preset).model, recipe(args.preset).settings
        title = args.preset
    elif args.gpu:
        config = dataclasses.replace(PRESETS[name], n_vocab=50304)
        batch_size = {"124M": 32, "355M": 16, "774M": 8, "1558M": 8}[name]
        title, settings = name, TrainSettings(batch_size=batch_size, accumulate=1)
    else:
        config = GPTConfig(n_vocab=50304, n_ctx=256, n_embd=384, n_head=6, n_layer=6)
        title, settings = "6 layers", TrainSettings(batch_size=4, accumulate=1, dtype="float32")
    if args.batch_size is not None:
        settings = dataclasses.replace(settings, batch_size=args.batch_size, accumulate=1)
    description = f"{title}, {weights.n_params(config):,} parameters, V={config.n_vocab}, "
    description += f"B={settings.batch_size}, T={config.n_ctx}, {settings.dtype}"
    return description, config, settings


def train(args: Args) -> list[Measurement]:
    """Measure a training step; on a GPU also steps of larger models, without peers."""
    measurements = [_training_step(args, "124M", with_peers=True)]
    if args.gpu and args.preset is None:
        measurements += [_training_step(args, name, with_peers=False) for name in ("355M", "1558M")]
    return measurements


def _training_step(args: Args, name: str, with_peers: bool) -> Measurement:
    description, config, settings = _training_work(args, name)
    unroll, remat = 1, "none"
    if args.gpu or args.preset:
        unroll, remat = recipe(args.preset or name).program(config.n_layer, "gpu" if args.gpu else "cpu")
    ours: dict[str, Spec] = {"gpt_jax": args.spec(peers.jax_step, config, settings, unroll, remat)}
    theirs: dict[str, Spec] = {
        "gpt_torch, eager": args.spec(peers.torch_step, config, settings, False, args.threads),
        "gpt_torch, compiled": args.spec(peers.torch_step, config, settings, True, args.threads),
        "transformers, eager": args.spec(peers.transformers_step, config, settings, args.threads),
    }
    specs = args.selected({**ours, **(theirs if with_peers else {})})
    matmul = None if args.gpu else args.spec(peers.matmul)
    timings, of_matmul = interleave(specs, args.rounds, args.calls, matmul)

    tokens = settings.batch_size * config.n_ctx
    flops = flops_per_token(config) * tokens / timings["gpt_jax"].median
    peak: float | None
    if of_matmul.seconds:
        peak = peers.MATMUL_FLOPS / of_matmul.median
        source = f"that multiplying two {peers.MATMUL_SIZE} x {peers.MATMUL_SIZE} matrices reaches"
    else:
        device = timings["gpt_jax"].device
        peak, source = peak_flops(device), f"of the {device}"
    note = f"Model FLOPs (6N + 12LDT per token): {flops / 1e12:.3f} TFLOP/s"
    if peak is not None:
        note += f", {flops / peak:.1%} of the {peak / 1e12:,.2f} TFLOP/s {source}"
    return Measurement(f"Training step: {description}", "step", tokens, "tokens", timings, [note])


def profile(args: Args) -> list[Measurement]:
    """Measure where a training step of gpt_jax spends its time on a CPU."""
    if args.gpu:
        raise InputError("profile measures on the CPU only; leave --gpu out")
    description, config, settings = _training_work(args)
    program = (1, "none") if args.preset is None else recipe(args.preset).program(config.n_layer, "cpu")
    spec = args.spec(operations.step_profile, config, settings, *program, args.calls)
    return [operations.measure(f"Profile of a training step: {description}", spec, args.rounds)]


def generate(args: Args) -> list[Measurement]:
    """Measure greedy decoding of one row and of several, the first token after a long prompt, and a file of prompts."""
    config = PRESETS[args.size]
    dtype = "bfloat16" if args.gpu else "float32"
    measurements = []
    for B, P, n_new in ((1, 16, 64), (32 if args.gpu else 8, 16, 64), (1, 512, 1)):
        prompts = np.random.default_rng(0).integers(0, config.n_vocab, (B, P)).tolist()
        specs = {
            "gpt_jax": args.spec(peers.jax_generation, config, prompts, n_new, dtype),
            "transformers": args.spec(peers.transformers_generation, config, prompts, n_new, dtype, args.threads),
            "gpt_torch": args.spec(peers.torch_generation, config, prompts, n_new, dtype, args.threads),
        }
        if not args.gpu:
            specs["CTranslate2"] = args.spec(ct2.generation, config, prompts, n_new, args.threads)
            specs["gpt_jax, bfloat16"] = args.spec(peers.jax_generation, config, prompts, n_new, "bfloat16")
        reads = args.spec(peers.memory_reads, args.threads)
        timings, of_reads = interleave(args.selected(specs), args.rounds, 1, reads)

        bandwidth = peers.READ_BYTES / of_reads.median if of_reads.seconds else math.nan
        # Each step reads every weight once, except the position table. The cache is read too, and is not counted.
        n_read = weights.n_params(config) - config.n_ctx * config.n_embd
        speed = (2 if args.gpu else 4) * n_read * n_new / timings["gpt_jax"].median
        note = f"Memory bandwidth: {bandwidth / 1e9:.1f} GB/s; reading gpt_jax's weights takes {speed / bandwidth:.0%}"
        title = f"Greedy decoding: {args.size}, {dtype}, {B} prompts of {P} tokens, {n_new} new tokens"
        notes = [note] if n_new > 1 and of_reads.seconds else []
        measurements.append(Measurement(title, "call", B * n_new, "tokens", timings, notes))
    return [*measurements, prompt_files.prompt_files(args, config, dtype, 32 if args.gpu else 8, 16, 64)]


def load(args: Args) -> list[Measurement]:
    """Measure loading random weights of full size from the page cache, each time in a new process, without imports."""
    config = PRESETS[args.size]
    megabytes = 4 * weights.n_params(config) / 1e6
    measurements = []
    with tempfile.TemporaryDirectory() as name:
        folders = {"openai": Path(name) / "openai", "huggingface": Path(name) / "huggingface"}
        arrays = weights.initial_weights(config, seed=0)
        for folder in folders.values():
            folder.mkdir()
        openai.write(folders["openai"], config, dict(weights.convert(arrays, "huggingface", "openai", config)))
        huggingface.write(folders["huggingface"], config, arrays)
        del arrays
        for format, folder in folders.items():
            specs = {
                "gpt_jax": args.spec(peers.jax_loading, folder),
                "gpt_torch": args.spec(peers.torch_loading, folder),
            }
            if format == "huggingface":
                specs["transformers"] = args.spec(peers.transformers_loading, folder)
            timings = first_calls(args.selected(specs), args.rounds)
            title = f"Loading: {args.size}, files in {format} format, {megabytes:,.0f} MB"
            measurements.append(Measurement(title, "load", megabytes, "MB", timings))
    return measurements


def compile(args: Args) -> list[Measurement]:
    """Measure initialization to first step, with an empty (cold) and a filled (warm) compilation cache."""
    description, config, settings = _training_work(args)
    workloads: dict[str, tuple] = {
        "gpt_jax, unrolled": (peers.jax_step, config, settings, config.n_layer, "none"),
        "gpt_jax, scanned": (peers.jax_step, config, settings, 1, "none"),
        "gpt_torch, compiled": (peers.torch_step, config, settings, True, args.threads),
    }
    if args.gpu:
        del workloads["gpt_jax, scanned"]  # a cold start takes minutes there
    runs: dict[str, list[Timings]] = {}
    for number in range(1 if args.gpu else min(args.rounds, 2)):
        for state in ("cold", "warm"):  # the first cache also serves what is measured afterwards
            cache = args.cache / str(number)
            specs = {f"{name}, {state}": args.spec(*work, cache=cache) for name, work in workloads.items()}
            for name, timings in first_calls(args.selected(specs), 1).items():
                runs.setdefault(name, []).append(timings)
    merged = {name: Timings.merge(of_peer) for name, of_peer in runs.items()}
    return [Measurement(f"Start to first step: {description}", "start", 1, "starts", merged)]


def start(args: Args) -> list[Measurement]:
    """Measure whole processes with an empty (cold) and a filled (warm) cache folder, and without a compilation cache.

    train_jax.py makes one step, evaluates, saves and samples; generate.py continues a prompt by 16 tokens.
    """
    model = ("--preset", "124M", "--tokenizer", "bytes", "--n-vocab", "50257") if args.gpu else ("--preset", "small")
    commands = {
        "train_jax.py": (*model, "--steps", "1", "--eval-every", "1", "--run", "run"),
        "generate.py": ("--run", "run", "--max-new-tokens", "16", "The "),
    }
    runs: dict[str, dict[str, list[Timings]]] = {name: {} for name in commands}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for state in ("cold", "warm", "no cache"):
                options = ("--no-compilation-cache",) if state == "no cache" else ()
                for name, arguments in commands.items():
                    spec = args.spec(starting.script, Path(folder), name, (*options, *arguments))
                    runs[name].setdefault(state, []).append(first_calls({name: spec}, 1)[name])
    return [
        Measurement(
            f"{name} {' '.join(commands[name])}",
            "process",
            1,
            "processes",
            {state: Timings.merge(timings) for state, timings in by_state.items()},
        )
        for name, by_state in runs.items()
    ]


def options(args: Args) -> list[Measurement]:
    """Measure one model's training step with different values of unroll, remat and accumulate, and on two devices."""
    description, config, settings = _training_work(args)
    cases: dict[str, tuple] = {}
    for unroll in sorted({1, 2, config.n_layer}):
        for remat in ("none", "products", "all"):
            if remat == "none" or unroll in (1, config.n_layer):
                cases[f"unroll {unroll}, remat {remat}"] = (settings, unroll, remat)
    for accumulate in (1, 2, 4):
        if accumulate != settings.accumulate and settings.batch_size % accumulate == 0:
            accumulated = dataclasses.replace(settings, accumulate=accumulate)
            cases[f"unroll 1, accumulate {accumulate}"] = (accumulated, 1, "none")
    specs = {name: args.spec(peers.jax_step, config, *case) for name, case in cases.items()}
    if not args.gpu and settings.batch_size % 2 == 0:
        case = (settings, config.n_layer, "none", 2)
        name = f"two devices, unroll {config.n_layer}, remat none"
        specs[name] = args.spec(peers.jax_step, config, *case, environment=TWO_DEVICES)
    timings, _ = interleave(args.selected(specs), args.rounds, args.calls)
    return [Measurement(f"Options: {description}", "step", settings.batch_size * config.n_ctx, "tokens", timings)]


def prepare(args: Args) -> list[Measurement]:
    """Measure tokenizing eight JSONL files, each Python's documentation 16 times, to shards on disk."""
    texts = [topics[name] for name in sorted(topics)] * 16
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    with tempfile.TemporaryDirectory() as name:
        sources, out = [Path(name) / f"{number}.jsonl" for number in range(8)], Path(name) / "out"
        for source in sources:
            source.write_text(lines, encoding="utf-8")
        specs = {
            f"prepare_data.py, {workers} {'worker' if workers == 1 else 'workers'}": args.spec(
                peers.preparing, sources, out, args.vocab_bpe, workers
            )
            for workers in sorted({args.threads, 1, 2}, key=lambda workers: (workers != args.threads, workers))
        }
        specs["tiktoken, one text at a time"] = args.spec(peers.tokenizing, sources, args.vocab_bpe, 1)
        several = args.spec(peers.tokenizing, sources, args.vocab_bpe, args.threads)
        specs[f"tiktoken, batches on {args.threads} threads"] = several
        timings, _ = interleave(args.selected(specs), args.rounds, 1)
        index = json.loads((out / "index.json").read_text())
    tokens = sum(shard["tokens"] for split in index["splits"].values() for shard in split["done"])
    return [Measurement(f"Tokenizing {tokens:,} tokens of JSONL", "pass", tokens, "tokens", timings)]


BENCHMARKS: Mapping[str, Callable[[Args], list[Measurement]]] = {
    "train": train,
    "profile": profile,
    "run": run,
    "generate": generate,
    "load": load,
    "compile": compile,
    "start": start,
    "options": options,
    "prepare": prepare,
    "evaluate": scoring.evaluate,
    "lora": adapters.lora,
    "batching": batching.batching,
    "serve": serving.serve,
}
ALL = ("compile", "train", "generate", "load")  # what `all` measures; compile comes first and fills the cache
