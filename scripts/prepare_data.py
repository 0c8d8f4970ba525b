"""Tokenize text, JSON and Parquet files into shards that the training scripts read.

    python scripts/prepare_data.py fineweb/*.parquet --out data/fineweb          # a Hugging Face export
    python scripts/prepare_data.py corpus.jsonl.gz books/ --out data/mine --workers 8
    python scripts/prepare_data.py --verify data/fineweb                         # compare all shards with the index

If it is interrupted, run it again with the same options: it resumes after the last complete shard.
"""

import dataclasses
import os
import time
from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from parity.cli import parse
from parity.console import PlainConsole
from parity.data import shard_index, shards
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError, exit_with_message


@dataclasses.dataclass(frozen=True)
class Args:
    sources: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE ...]")] = ()
    """Files to tokenize (.txt, .jsonl, .ndjson, these also as .gz, .json, .parquet) and folders of them. In .txt files,
    <|endoftext|> ends a document."""
    out: Path | None = None
    """Folder for the shards and index.json, required unless --verify is given; pass it to a training script as
    --corpus."""
    tokenizer: Literal["gpt2", "bytes"] = "gpt2"
    """Tokenizer that encodes the documents; the training script must use the same one."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe for the gpt2 tokenizer; by default the one in the cache folder or of a downloaded model."""
    text_field: str = "text"
    """Field of JSONL and column of Parquet that holds the text."""
    validation_fraction: float = 0.005
    """Fraction of the documents that are held out for validation."""
    shard_tokens: int = 100_000_000
    """Number of tokens per shard; each token takes two bytes."""
    workers: int = os.cpu_count() or 1
    """Number of threads that tokenize; by default one per CPU core."""
    verify: Path | None = None
    """Prepare nothing; compare the shards in this folder with the sha256 in its index."""


def main() -> None:
    args, console = parse(Args, __doc__), PlainConsole(lossy=True)
    if args.verify is not None:
        console.print(f"{shard_index.verify(args.verify)} shards of {args.verify} match their sha256")
        return
    if not args.sources or args.out is None:
        raise InputError("name the files to tokenize and, with --out, the folder for the shards")
    tokenizer = load_tokenizer(args.tokenizer, args.vocab_bpe)
    columns = (SpinnerColumn(), TextColumn("{task.fields[summary]}", markup=False), TimeElapsedColumn())
    begin = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", summary="reading")

        def show(done: shards.Progress) -> None:
            speed = done.tokens / (time.perf_counter() - begin)
            counts = f"{done.documents:,} documents, {done.tokens:,} tokens, {done.shards} shards"
            progress.update(bar, summary=f"{counts}, {speed:,.0f} tokens/s")

        index = shards.prepare_shards(
            args.sources,
            args.out,
            tokenizer,
            args.text_field,
            args.validation_fraction,
            args.shard_tokens,
            args.workers,
            show,
        )
    seconds = time.perf_counter() - begin
    for split in shard_index.SPLITS:
        written = index["splits"][split]["done"]
        count = sum(shard["tokens"] for shard in written)
        console.print(f"{split:<10} {count:,} tokens in {len(written)} shards")
    console.print(f"{seconds:.1f} s; train on it with --corpus {args.out}", soft_wrap=True)


if __name__ == "__main__":
    with exit_with_message():
        main()
