"""Train a GPT-2 with the JAX backend.

python scripts/train_jax.py                                       # small, embedded corpus, any CPU
python scripts/train_jax.py --preset 124M --settings.corpus DIR --device gpu
python scripts/train_jax.py --run runs/NAME --resume              # go on
"""

import dataclasses
import math
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Literal

import tyro
from rich.console import Console

from gpt_jax.devices import choose_attention, choose_device, describe
from gpt_jax.train import Trainer
from parity import checkpoints, weights
from parity.bigram import bigram_loss
from parity.config import as_config
from parity.corpora import load_corpus
from parity.data import Windows
from parity.errors import exit_with_message
from parity.fit import fit
from parity.runs import RunFolder, run_config
from parity.settings import TrainSettings, settings_for
from parity.tokenizer import load_tokenizer

_MOST_BIGRAM_TOKENS = 50_000_000  # a bigram of more takes long and much memory


@dataclasses.dataclass(frozen=True)
class Args:
    preset: str = "small"
    """Model: small, tiny, notebook, 124M, 355M, 774M or 1558M; also sets the defaults of the settings."""
    n_ctx: int | None = None
    """Another context length than the preset's."""
    drop_rate: float | None = None
    """Another dropout than the preset's."""
    run: Path | None = None
    """Run folder; by default a new one in runs/."""
    resume: bool = False
    """Continue the run in --run from its newest intact checkpoint."""
    device: Literal["auto", "cpu", "gpu", "tpu"] = "auto"
    attention: Literal["auto", "explicit", "cudnn"] = "auto"
    unroll: int = 1
    """Layers written out in the compiled program; more compiles longer and may run faster."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe, for the gpt2 tokenizer."""
    settings: TrainSettings = dataclasses.field(default_factory=TrainSettings)


def parse() -> Args:
    """The flags over the preset's settings or, when resuming, over the run's own."""
    first = tyro.cli(Args, description=__doc__)
    default = dataclasses.replace(Args(), preset=first.preset, settings=settings_for(first.preset))
    if first.resume and first.run is not None:
        saved = RunFolder(first.run).config()
        default = dataclasses.replace(
            default,
            preset=saved["preset"],
            n_ctx=saved["model"]["n_ctx"],
            drop_rate=saved["model"]["drop_rate"],
            settings=TrainSettings(**saved["train"]),
        )
    return tyro.cli(Args, description=__doc__, default=default)


def main() -> int:
    args = parse()
    settings, console = args.settings, Console()

    # Device
    device = choose_device(args.device)

    # Model, tokenizer and data
    config = as_config(args.preset)
    changes = {name: getattr(args, name) for name in ("n_ctx", "drop_rate") if getattr(args, name) is not None}
    tokenizer = load_tokenizer(settings.tokenizer, args.vocab_bpe)
    config = dataclasses.replace(config, n_vocab=tokenizer.n_vocab, **changes)
    corpus = load_corpus(settings.corpus, tokenizer, settings.validation_part)
    train = Windows(corpus.train, config.n_ctx, config.n_vocab, settings.stride, name=f"{corpus.name} (training)")
    validation = Windows(corpus.validation, config.n_ctx, config.n_vocab, name=f"{corpus.name} (validation)")
    attention = choose_attention(args.attention, device, settings.dtype, config.drop_rate)

    # Run folder
    run = RunFolder(args.run or Path("runs") / f"{datetime.now():%Y%m%d-%H%M%S}-{args.preset}")
    entries = run_config(args.preset, config, settings, corpus.sha256, "jax")
    if args.resume:
        run.require(entries)
    else:
        run.create(entries)

    # What runs
    console.print(f"device     {describe(device)}", highlight=False)
    console.print(f"precision  computes in {settings.dtype}, parameters float32; attention {attention}")
    console.print(f"model      {args.preset}: {weights.n_params(config):,} parameters, context {config.n_ctx}")
    console.print(f"corpus     {corpus.name}: {train.n_tokens:,} + {validation.n_tokens:,} tokens ({tokenizer.name})")
    console.print(f"run        {run.path}", highlight=False)
    bigram = None
    if train.n_tokens <= _MOST_BIGRAM_TOKENS:
        bigram = bigram_loss(corpus.train, corpus.validation, config.n_vocab)
        console.print(f"baseline   bigram model, validation loss {bigram:.4f}  perplexity {math.exp(bigram):.2f}")

    # Train
    trainer = Trainer(config, settings, attention, min(args.unroll, config.n_layer))
    done = 0
    if args.resume:
        newest = checkpoints.newest_intact(run.checkpoints)
        trainer.restore(newest)
        done = int(newest.name)
        run.forget_after(done)
        console.print(f"resuming   after step {done}")
    begin = time.perf_counter()
    status = fit(trainer, run, settings, train, validation, tokenizer, bigram, done, console)

    # What came of it
    last = [entry for entry in run.metrics() if "validation_loss" in entry][-1]
    beside = "" if bigram is None else f", bigram {bigram:.4f}"
    console.print(f"validation loss {last['validation_loss']:.4f}{beside}; {time.perf_counter() - begin:.0f} s")
    console.print(
        f'sample from it: python scripts/generate.py --run {run.path} "The "', highlight=False, soft_wrap=True
    )
    return status


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
