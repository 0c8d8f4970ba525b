"""Measure gpt_jax against what else one could run, alternating in one process.

python scripts/benchmark.py train       # a training step; peers: gpt_torch
python scripts/benchmark.py generate    # greedy decoding at 124M; peers: transformers, gpt_torch
python scripts/benchmark.py prepare --vocab-bpe vocab.bpe   # text to token shards; peers: tiktoken, used plainly
"""

import dataclasses
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, Literal

import jax
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.progress import track
from rich.table import Table
from transformers import GPT2Config, GPT2LMHeadModel

import gpt_jax
import gpt_torch
from gpt_jax.train import Trainer
from gpt_torch import GPTModel
from gpt_torch.train import Trainer as TorchTrainer
from parity import prepare
from parity.config import PRESETS, GPTConfig
from parity.errors import exit_with_message
from parity.settings import recipe
from parity.tokenizer import load_tokenizer
from parity.weights import n_params


@dataclasses.dataclass(frozen=True)
class Args:
    what: tyro.conf.Positional[Literal["train", "generate", "prepare"]] = "train"
    n_layer: int = 6
    n_embd: int = 384
    n_head: int = 6
    n_vocab: int = 50304
    n_ctx: int = 256
    batch_size: int = 4
    rounds: int = 5
    steps: int = 3
    """Training steps of each peer in a round; the first round warms up and does not count."""
    threads: int = 0
    """Threads of torch; by default as many as this process has cores. XLA takes them all."""
    cases: tuple[Literal["one", "eight", "first"], ...] = ("one", "eight", "first")
    """Of generate: one row, eight rows, the first token after a long prompt."""
    vocab_bpe: Path | None = None
    """Of prepare: OpenAI's vocab.bpe; by default the one in the cache."""
    out: Path | None = None
    """Where to write the figures as JSON."""


def jax_stepper(config: GPTConfig, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], None]:
    trainer = Trainer(config, recipe("small").settings, unroll=config.n_layer)

    def step() -> None:
        jax.block_until_ready(trainer.train_step(inputs[None], targets[None], 1e-3, 0))

    return step


def torch_stepper(config: GPTConfig, inputs: np.ndarray, targets: np.ndarray, compile: bool) -> Callable[[], None]:
    """The same step in torch: its fused attention and its fused AdamW, eager or compiled."""
    trainer = TorchTrainer(config, recipe("small").settings, attention="sdpa", compile=compile)

    def step() -> None:
        trainer.train_step(*trainer.put(inputs[None], targets[None]), 1e-3, 0)

    return step


def alternate(peers: dict[str, Callable[[], Any]], rounds: int, steps: int) -> dict[str, list[float]]:
    """Seconds of each call, the peers taking turns; the first round warms up and does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for round_number in track(range(rounds + 1), "measuring", transient=True):
        for name, call in peers.items():
            for _ in range(steps):
                begin = time.perf_counter()
                call()
                if round_number:
                    seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare(title: str, seconds: dict[str, list[float]], tokens: int, unit: str) -> dict[str, dict[str, float]]:
    """Print medians beside those of the first peer, which is ours; the same figures by name."""
    ours = statistics.median(next(iter(seconds.values())))
    table = Table("peer", f"ms a {unit}", "spread", "tokens/s", "speed of the first over it", title=title)
    figures = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        figures[name] = {
            "median_s": median,
            "min_s": min(times),
            "max_s": max(times),
            "tokens_per_s": tokens / median,
            "ratio": median / ours,
        }
        spread = f"{min(times) * 1e3:.0f}..{max(times) * 1e3:.0f}"
        table.add_row(name, f"{median * 1e3:.0f}", spread, f"{tokens / median:,.1f}", f"{median / ours:.2f}")
    Console().print(table)
    return figures


def train(args: Args) -> dict[str, Any]:
    config = GPTConfig(args.n_vocab, args.n_ctx, args.n_embd, args.n_head, args.n_layer)
    ids = np.random.default_rng(0).integers(0, args.n_vocab, (args.batch_size, args.n_ctx + 1), dtype=np.int32)
    inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    peers = {
        "gpt_jax": jax_stepper(config, inputs, targets),
        "gpt_torch eager, SDPA": torch_stepper(config, inputs, targets, compile=False),
        "gpt_torch compiled, SDPA": torch_stepper(config, inputs, targets, compile=True),
    }
    title = (
        f"training step, float32, {jax.devices()[0].platform}, {torch.get_num_threads()} threads: "
        f"{n_params(config):,} parameters, B={args.batch_size} T={args.n_ctx}"
    )
    seconds = alternate(peers, args.rounds, args.steps)
    return {"config": config.to_dict(), "peers": compare(title, seconds, inputs.size, "step")}


def generate(args: Args) -> dict[str, Any]:
    """Greedy decoding of 124M's shape: one row, eight rows, and the first token after a long prompt."""
    config = PRESETS["124M"]
    model = gpt_jax.GPTModel(config)
    ours, half = gpt_jax.for_decoding(model), gpt_jax.for_decoding(gpt_jax.cast(model, "bfloat16"))
    reference = GPTModel(config)
    theirs = GPT2LMHeadModel(GPT2Config()).eval()  # the same shape and sizes; its own random weights
    threads = torch.get_num_threads()
    memory = torch.ones(2**27)
    reads: list[float] = []

    def read_memory() -> None:
        """Ten sums of 512 MiB on all threads: of what torch and NumPy have, the fastest way to read memory."""
        for _ in range(10):
            begin = time.perf_counter()
            memory.sum()
            reads.append(memory.nbytes / (time.perf_counter() - begin))

    results: dict[str, Any] = {}
    cases = {"one": (1, 16, 64), "eight": (8, 16, 64), "first": (1, 512, 1)}
    for case in args.cases:
        B, P, new = cases[case]
        ids = np.random.default_rng(0).integers(0, config.n_vocab, (B, P))
        rows, tensor = ids.tolist(), torch.from_numpy(ids)

        def by_transformers(tensor: torch.Tensor = tensor, new: int = new) -> None:
            mask = torch.ones_like(tensor)
            limits = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": 50256}
            theirs.generate(tensor, attention_mask=mask, do_sample=False, **limits)

        def by(package: Any, model: Any, rows: list = rows, new: int = new) -> Callable[[], Any]:
            return lambda: package.generate(model, rows, new, temperature=0)

        peers = {
            "gpt_jax": by(gpt_jax, ours),
            "transformers": by_transformers,
            "gpt_torch": by(gpt_torch, reference),
            "gpt_jax, bfloat16 weights": by(gpt_jax, half),
            "reading memory": read_memory,
        }
        seconds = alternate(peers, args.rounds, 1)
        del seconds["reading memory"]
        bandwidth = statistics.median(reads)
        title = f"greedy, float32, cpu, {threads} threads: batch {B}, prompt {P}, {new} new tokens"
        figures = compare(title, seconds, B * new, "call")
        # Every weight but the position table's is read once a step; the cache comes on top and is not counted.
        read = 4 * (n_params(config) - config.n_ctx * config.n_embd)
        share = read * figures["gpt_jax"]["tokens_per_s"] / B / bandwidth
        if new > 1:
            Console().print(f"memory reads {bandwidth / 1e9:.1f} GB/s; gpt_jax's weights alone {share:.0%} of it\n")
        results[f"B={B} P={P} new={new}"] = {"peers": figures, "read_bandwidth": bandwidth, "share": share}
    return results


def prepare_shards(args: Args) -> dict[str, Any]:
    """Python's documentation, twenty times over, as JSONL: to shards on the disk, or to arrays in memory."""
    tokenizer = load_tokenizer("gpt2", args.vocab_bpe)
    texts = [topics[name] for name in sorted(topics)] * 20
    threads = torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "topics.jsonl"
        source.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")

        def ours() -> int:
            shutil.rmtree(out, ignore_errors=True)
            index = prepare.prepare([source], out, tokenizer, workers=threads)
            return sum(shard["tokens"] for split in index["splits"].values() for shard in split["done"])

        def lines() -> list[str]:
            return [json.loads(line)["text"] for line in source.open(encoding="utf-8")]

        out = Path(folder) / "out"
        tokens = ours()
        peers = {
            f"prepare_data.py, {threads} workers": ours,
            "tiktoken, one text after another": lambda: [
                np.array(tokenizer.encoding.encode_ordinary(text), np.uint16) for text in lines()
            ],
            f"tiktoken encode_ordinary_batch, {threads} threads": lambda: [
                np.array(ids, np.uint16)
                for ids in tokenizer.encoding.encode_ordinary_batch(lines(), num_threads=threads)
            ],
        }
        seconds = alternate(peers, args.rounds, 1)
    return {"peers": compare(f"tokenizing {tokens:,} tokens of JSONL", seconds, tokens, "pass")}


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    figures = {"train": train, "generate": generate, "prepare": prepare_shards}[args.what](args)
    if args.out is not None:
        args.out.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    with exit_with_message():
        main()
