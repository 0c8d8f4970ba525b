"""Tokenize text, JSON and Parquet files into shards that the training scripts read.

    python scripts/prepare_data.py fineweb/*.parquet --out data/fineweb          # a Hugging Face export
    python scripts/prepare_data.py corpus.jsonl.gz books/ --out data/mine --workers 8
    python scripts/prepare_data.py --verify data/fineweb                         # compare all shards with the index

If it is interrupted, run it again with the same options: it resumes. The work can be divided in two passes among
machines that share the sources and the output folder, or done by a Ray cluster:

    python scripts/prepare_data.py fineweb/*.parquet --out data/fineweb --part 0/2             # and --part 1/2
    python scripts/prepare_data.py fineweb/*.parquet --out data/fineweb --part 0/2 --pass 2    # and --part 1/2
    python scripts/prepare_data.py fineweb/*.parquet --out data/fineweb --finish
    python scripts/prepare_data.py fineweb/*.parquet --out data/fineweb --ray auto

docs/guides/corpora.md explains this.
"""

import contextlib
import dataclasses
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from parity.cli import changed_options, parse
from parity.console import PlainConsole
from parity.data import passes, shard_index
from parity.data.engines import RayCluster
from parity.data.shards import Request, finish_parts, prepare_part, prepare_shards
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError, exit_with_message
from parity.parts import parse_part, usable_cores


@dataclasses.dataclass(frozen=True)
class Args:
    sources: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="[SOURCE ...]")] = ()
    """Files to tokenize (.txt, .jsonl, .ndjson, these also as .gz, .json, .parquet) and folders of them, by path or by
    address (s3://, gs://, hf://datasets/..., https:// for single files). In .txt files, <|endoftext|> ends a
    document."""
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
    workers: int | None = None
    """Number of processes, each of which tokenizes one file at a time; where there are fewer files, number of threads
    that tokenize. By default one per CPU core that this program may use."""
    part: str | None = None
    """Do only one part of one pass, given as k/n: 0/4 is the first of four. The other parts may be done at any time, on
    any machine that shares the sources and --out, with the same options. By default everything is done."""
    stage: Annotated[Literal[1, 2] | None, tyro.conf.arg(name="pass")] = None
    """With --part, which of the two passes: 1, the default, tokenizes files; 2, which needs all parts of pass 1, writes
    shards."""
    finish: bool = False
    """After all parts of both passes, check that they are complete and write index.json."""
    ray: str | None = None
    """Do all of the work as tasks of a Ray cluster, each on one CPU core: the address of the cluster, "auto" for the
    cluster running on this machine, or "local" for one that is started on this machine, with --workers cores. This
    needs the extra ray. By default no cluster is used."""
    verify: Path | None = None
    """Prepare nothing; compare the shards in this folder with the sha256 in its index."""


_SHOWN = {"--sources": "SOURCE", "--stage": "--pass"}  # options that are not named like their fields


def main() -> None:
    args, console = parse(Args, __doc__), PlainConsole(lossy=True)
    _check(args)
    if args.verify is not None:
        console.print(f"{shard_index.verify(args.verify)} shards of {args.verify} match their sha256")
        return
    workers, stage = usable_cores() if args.workers is None else args.workers, args.stage or 1
    options: dict[str, Any] = {
        "sources": args.sources,
        "out": args.out,
        "tokenizer": load_tokenizer(args.tokenizer, args.vocab_bpe),
        "text_field": args.text_field,
        "validation_fraction": args.validation_fraction,
        "shard_tokens": args.shard_tokens,
    }
    begin = time.perf_counter()
    with _progress_bar(console) as show:
        if args.part is not None:
            prepare_part(Request(**options), parse_part(args.part), stage, workers, show)
        elif args.finish:
            finish_parts(Request(**options))
        elif args.ray is not None:
            with RayCluster(args.ray, workers) as cluster:
                prepare_shards(**options, on_progress=show, engine=cluster)
        else:
            prepare_shards(**options, workers=workers, on_progress=show)
    seconds = time.perf_counter() - begin
    if args.part is not None:
        console.print(f"part {args.part} of pass {stage} is complete, {seconds:.1f} s", soft_wrap=True)
        return
    assert args.out is not None
    for split, written in shard_index.read_index(args.out)["splits"].items():
        count = sum(shard["tokens"] for shard in written["done"])
        console.print(f"{split:<10} {count:,} tokens in {len(written['done'])} shards")
    console.print(f"{seconds:.1f} s; train on it with --corpus {args.out}", soft_wrap=True)


def _check(args: Args) -> None:
    """Raise InputError for options that do not fit each other."""
    if args.verify is not None:
        if given := changed_options(args, Args(verify=args.verify)):
            names = ", ".join(_SHOWN.get(option, option) for option in given)
            raise InputError(f"--verify reads the shards of its folder and does nothing else; leave {names} out")
        return
    if not args.sources or args.out is None:
        raise InputError("name the files to tokenize and, with --out, the folder for the shards")
    ways = [f"--{name}" for name in ("part", "finish", "ray") if getattr(args, name)]
    if len(ways) > 1:
        raise InputError(f"{ways[0]} and {ways[1]} exclude each other; choose one")
    if args.stage is not None and args.part is None:
        raise InputError("--pass needs --part k/n; without it, both passes are done")
    if args.workers is not None and (args.finish or args.ray not in (None, "local")):
        raise InputError(f"--workers has no effect with {ways[0]}; leave it out")


@contextlib.contextmanager
def _progress_bar(console: PlainConsole) -> Iterator[passes.OnProgress]:
    """Yield a function that shows progress on a terminal."""
    columns = (SpinnerColumn(), TextColumn("{task.fields[summary]}", markup=False), TimeElapsedColumn())
    begin = time.perf_counter()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", summary="reading")

        def show(done: passes.Progress) -> None:
            counts = f"{done.documents:,} documents, {done.tokens:,} tokens"
            speed = f"{done.tokens / (time.perf_counter() - begin):,.0f} tokens/s"
            progress.update(bar, summary=f"{counts}, {f'{done.shards} shards' if done.shards else speed}")

        yield show


if __name__ == "__main__":
    with exit_with_message():
        main()
