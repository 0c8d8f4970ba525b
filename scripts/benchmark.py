"""Measure our JAX training step against our PyTorch model, alternating in one run.

python scripts/benchmark.py train
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import torch
import tyro
from rich.console import Console
from rich.table import Table

from gpt_jax.train import Trainer
from gpt_torch import GPTModel
from gpt_torch.train import calc_loss
from parity.config import GPTConfig
from parity.errors import exit_with_message
from parity.settings import settings_for
from parity.weights import n_params


@dataclasses.dataclass(frozen=True)
class Args:
    what: tyro.conf.Positional[Literal["train"]] = "train"
    n_layer: int = 6
    n_embd: int = 384
    n_head: int = 6
    n_vocab: int = 50304
    n_ctx: int = 256
    batch_size: int = 4
    rounds: int = 5
    steps: int = 3
    """Steps of each peer in a round; the first round warms up and does not count."""
    threads: int = 0
    """Threads of torch; by default as many as this process has cores. XLA takes them all."""
    out: Path | None = None
    """Where to write the figures as JSON."""


def jax_stepper(config: GPTConfig, inputs: np.ndarray, targets: np.ndarray) -> Callable[[], None]:
    trainer = Trainer(config, settings_for("small"), unroll=config.n_layer)

    def step() -> None:
        jax.block_until_ready(trainer.train_step(inputs[None], targets[None], 1e-3, 0))

    return step


def torch_stepper(config: GPTConfig, inputs: np.ndarray, targets: np.ndarray, attention: str) -> Callable[[], None]:
    """Eager mode, with the same clip and AdamW as the JAX step (decay on every parameter: the cost is the same)."""
    settings = settings_for("small")
    model = GPTModel(config, seed=settings.seed, attention=attention).train()
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, betas, settings.eps, settings.weight_decay, fused=True)
    batch = torch.from_numpy(inputs).long(), torch.from_numpy(targets).long()

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        calc_loss(model, *batch).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()

    return step


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    torch.set_num_threads(args.threads or len(os.sched_getaffinity(0)))
    config = GPTConfig(args.n_vocab, args.n_ctx, args.n_embd, args.n_head, args.n_layer)
    ids = np.random.default_rng(0).integers(0, args.n_vocab, (args.batch_size, args.n_ctx + 1), dtype=np.int32)
    inputs, targets = ids[:, :-1].copy(), ids[:, 1:].copy()
    peers = {
        "gpt_jax": jax_stepper(config, inputs, targets),
        "gpt_torch eager, explicit attention": torch_stepper(config, inputs, targets, "explicit"),
        "gpt_torch eager, SDPA": torch_stepper(config, inputs, targets, "sdpa"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for round_number in range(args.rounds + 1):
        for name, step in peers.items():
            for _ in range(args.steps):
                begin = time.perf_counter()
                step()
                if round_number:
                    seconds[name].append(time.perf_counter() - begin)

    tokens = args.batch_size * args.n_ctx
    ours = statistics.median(seconds["gpt_jax"])
    title = (
        f"training step, float32, {jax.devices()[0].platform}, {torch.get_num_threads()} threads: "
        f"{n_params(config):,} parameters, B={args.batch_size} T={args.n_ctx}"
    )
    table = Table("peer", "ms a step", "spread", "tokens/s", "speed of gpt_jax over it", title=title)
    rows = {}
    for name, times in seconds.items():
        median = statistics.median(times)
        rows[name] = {"median_s": median, "min_s": min(times), "max_s": max(times), "ratio": median / ours}
        spread = f"{min(times) * 1e3:.0f}..{max(times) * 1e3:.0f}"
        table.add_row(name, f"{median * 1e3:.0f}", spread, f"{tokens / median:,.0f}", f"{median / ours:.2f}")
    Console().print(table)
    if args.out is not None:
        args.out.write_text(json.dumps({"config": config.to_dict(), "peers": rows}, indent=2) + "\n")


if __name__ == "__main__":
    with exit_with_message():
        main()
