"""Evaluate a model by named protocols: accuracy, perplexity or loss, with standard errors and published numbers.

    python scripts/evaluate.py --list
    python scripts/evaluate.py --model 124M --protocol lambada-openai/last-word hellaswag/completion
    python scripts/evaluate.py --run runs/NAME --protocol loss --corpus my.txt --compare 124M
    python scripts/evaluate.py --model 124M --protocol wikitext-2/hf-1024 --data wiki.test.raw --backend torch
    python scripts/evaluate.py --model 124M --protocol core --data eval_bundle.zip --out evaluations/core --part 0/4
    python scripts/evaluate.py --out evaluations/core --finish
    torchrun --nproc-per-node 2 -- scripts/evaluate.py --model 124M --protocol lambada-core --backend torch

Writes results.json, and items.jsonl with a line per item, into --out; started again, it goes on where it was stopped.
"""

import contextlib
import dataclasses
import functools
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from parity.cli import parse, read_text
from parity.console import PlainConsole, TaskProgress
from parity.errors import InputError, exit_with_message
from parity.evaluation import data, parts, report
from parity.evaluation.catalog import find
from parity.evaluation.protocol import Item, Protocol, Task
from parity.evaluation.records import Records, default_folder, open_records
from parity.evaluation.run import Record, items_of, records_of, results_of
from parity.evaluation.scorer import Scorer
from parity.evaluation.weights import model_sha256
from parity.loading import Loaded, ModelArgs
from parity.parts import Part, parse_part
from parity.storage.remote import is_address
from parity.training.processes import JoinArgs, Processes
from parity.training.runs import RunFolder

_COLUMNS = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())


@dataclasses.dataclass(frozen=True)
class Args(JoinArgs, ModelArgs):
    protocol: tuple[str, ...] = ()
    """Names of the protocols; --list shows them."""
    list: bool = False
    """Show all protocols, with their data and the published numbers, and exit."""
    data: Path | None = None
    """The protocol's file on this machine, the archive that contains it, or a folder with either. By default the file
    is downloaded into the cache folder once."""
    corpus: str | None = None
    """What the protocol loss evaluates: a text, a folder or the name of a corpus, as for the training scripts."""
    split: Literal["validation", "all"] = "validation"
    """Part of the corpus: the validation part, as in training, or all of it."""
    stop_words: Path | None = None
    """UTF-8 file with the words, separated by white space, that lambada-openai/stop-words passes over. By default a
    list of English function words."""
    limit: int | None = None
    """Evaluate only the first N items, and say so in the results."""
    control: bool = False
    """Give each item the context of another one: the accuracy of a model that reads contexts falls to that of guessing
    from the options."""
    compare: str | None = None
    """Another model (a size, a folder or file with weights, or a run) that is evaluated on the same items; the results
    contain the differences with their paired standard errors."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and of the computation."""
    batch_size: int | None = None
    """Number of sequences that are computed at once. By default, a number that the device computes efficiently."""
    mesh: str | None = None
    """Devices that share each batch, with --backend jax, for example data=4. By default one device, or all devices of
    all processes."""
    out: Path | None = None
    """Folder for results.json and items.jsonl. By default evaluations/NAME, with a name made of the options."""
    part: str | None = None
    """Evaluate only part k/n of the items, where k counts from 0, into the folder OUT/k-of-n. Parts may run at the same
    time on several machines; --finish adds them up. By default all items."""
    finish: bool = False
    """Write the results of the evaluation in --out, all of whose parts are computed. Only --out is needed as well."""


class Model(NamedTuple):
    """One of the models that are evaluated."""

    name: str
    loaded: Loaded
    scorer: Scorer
    sha256: str


def main() -> None:
    args = parse(Args, __doc__)
    console = PlainConsole(width=None if sys.stdout.isatty() else 160)
    if args.list:
        report.show_list(console)
        return
    if args.finish:
        for result in finish(args):
            report.show(console, result)
        console.print(f"{args.out}", soft_wrap=True)
        return
    protocols = check(args)
    part = None if args.part is None else parse_part(args.part)
    with processes(args) as these:
        evaluate(args, protocols, part, these, PlainConsole(width=console.width, quiet=not these.first))


def finish(args: Args) -> list[dict[str, Any]]:
    """Add up the parts of an evaluation, and return the result of each protocol."""
    if args.out is None:
        raise InputError("--finish needs --out, the folder with the parts")
    if dataclasses.replace(args, out=None, finish=False) != Args():
        raise InputError("--finish takes no options but --out; the parts have those of the evaluation")
    return parts.finish(args.out)


def check(args: Args) -> list[Protocol]:
    """Return the protocols; raise InputError for options that do not fit."""
    if not args.protocol:
        raise InputError("give --protocol NAME; --list shows all names")
    protocols = [find(name) for name in dict.fromkeys(args.protocol)]
    if args.limit is not None and args.limit < 1:
        raise InputError(f"--limit must be at least 1, got {args.limit}")
    for protocol in protocols:
        if args.control and not protocol.has_control:
            raise InputError(f"--control exchanges contexts, which {protocol.name} does not have")
    if args.corpus is not None and "loss" not in args.protocol:
        raise InputError("--corpus is for --protocol loss")
    if args.split != "validation" and "loss" not in args.protocol:
        raise InputError("--split is for --protocol loss")
    if args.data is not None and all(protocol.data is None for protocol in protocols):
        raise InputError(f"--data is for protocols with a file of their own; {args.protocol[0]} reads --corpus")
    if args.stop_words is not None and "lambada-openai/stop-words" not in args.protocol:
        raise InputError("--stop-words is for --protocol lambada-openai/stop-words")
    return protocols


@contextlib.contextmanager
def processes(args: Args) -> Iterator[Processes]:
    """Join the other processes, if there are any."""
    module = importlib.import_module(f"gpt_{args.backend}.distributed")
    if args.backend == "jax":
        with module.processes(*args.join_options) as these:
            yield these
    else:
        args.refuse_for_torch("scripts/evaluate.py")
        with module.processes(args.join_timeout) as these:
            yield these


def evaluate(args: Args, protocols: list[Protocol], part: Part | None, these: Processes, console: PlainConsole) -> None:
    models = load_models(args)
    tokenizer = models[0].loaded.tokenizer
    n_ctx = min(model.scorer.config.n_ctx for model in models)
    words = stop_words(args)
    task = Task(None, tokenizer, n_ctx, args.control, args.corpus, args.split, words, args.data, args.limit)
    stderr = PlainConsole(stderr=True, lossy=True, quiet=not these.first)
    tasks = {protocol.name: prepared(protocol, task, stderr) for protocol in protocols}
    common = {
        "tokenizer": tokenizer.name,
        "backend": args.backend,
        "device": models[0].loaded.device_info,
        "dtype": args.dtype,
        "limit": args.limit,
        "control": args.control,
    }
    settings = {
        **common,
        "weights_sha256": [model.sha256 for model in models],
        "n_ctx": task.n_ctx,
        "batch_size": args.batch_size,
        "mesh": args.mesh,
        "processes": these.count,
        "stop_words": sorted(task.stop_words or ()),
        "protocols": {
            protocol.name: {"version": protocol.version, "data_sha256": tasks[protocol.name][1]["sha256"]}
            for protocol in protocols
        },
    }
    folder = args.out or default_folder([model.name for model in models], settings)
    if part is not None:
        folder, settings = parts.part_folder(folder, part), {**settings, "part": str(part)}
    items = {protocol.name: items_of(protocol, tasks[protocol.name][0]) for protocol in protocols}
    with contextlib.closing(open_records(folder, settings, these)) as records:
        results: list[dict[str, Any]] = []
        labelled = list(zip("ab", models, strict=False))
        identities = [(model.name, model.sha256) for model in models]
        for protocol in protocols:
            task, source = tasks[protocol.name]
            of_protocol = items[protocol.name]
            rows = [
                score(protocol, task, of_protocol, model, records, label, part, stderr) for label, model in labelled
            ]
            is_comparable = source["is_published"] and args.limit is None and not args.control
            facts = {
                "protocol": protocol.name,
                "version": protocol.version,
                "description": protocol.description,
                "data": source,
                **common,
                "items": len(of_protocol),
                "truncated_items": sum(n_cut > 0 for _, n_cut in of_protocol),
            }
            if part is None:
                results.append({**facts, **results_of(protocol, identities, rows, is_comparable)})
                report.show(console, results[-1])
            else:
                results.append({**facts, **parts.unfinished_results(identities, is_comparable)})
                console.print(f"{protocol.name}: {len(rows[0]):,} of {len(of_protocol):,} items, part {part}")
            records.finish(results)
    console.print(f"{folder}", soft_wrap=True)


def load_models(args: Args) -> list[Model]:
    """Load --model or --run, and --compare."""
    chosen = [args]
    if args.compare is not None:
        is_run = is_address(args.compare) or RunFolder(Path(args.compare)).checkpoints.is_dir()
        other = {"run": args.compare, "model": None} if is_run else {"run": None, "model": args.compare}
        chosen.append(dataclasses.replace(args, checkpoint="newest", adapter=None, **other))  # type: ignore[arg-type]
    models = []
    for options in chosen:
        loaded = options.load()
        model = loaded.backend.cast(loaded.model, args.dtype)
        scorer = Scorer(loaded.backend, model, args.batch_size, make_mesh(args))
        name = f"{options.run or options.model}{f' + {options.adapter}' if options.adapter else ''}"
        sha256 = model_sha256(loaded.backend, loaded.model, loaded.folder, options.adapter)
        models.append(Model(name, loaded._replace(model=None), scorer, sha256))
    names = [model.loaded.tokenizer.name for model in models]
    if len(set(names)) > 1:
        raise InputError(f"--compare needs models with the same tokenizer; these have {' and '.join(names)}")
    return models


def make_mesh(args: Args) -> Any:
    """Return the devices that share each batch; None for one device."""
    if args.backend == "torch":
        if args.mesh is not None:
            raise InputError("--mesh is for --backend jax; to use several devices in torch, start it with torchrun")
        return None
    from gpt_jax.devices import choose_device
    from gpt_jax.sharding import MeshShape, make_mesh

    shape = MeshShape.chosen(args.mesh)
    return None if shape is None else make_mesh(shape, choose_device(args.device).platform)


def stop_words(args: Args) -> frozenset[str] | None:
    if args.stop_words is None:
        return None
    words = frozenset(read_text(args.stop_words, "--stop-words").lower().split())
    if not words:
        raise InputError(f"--stop-words {args.stop_words} is empty")
    return words


def prepared(protocol: Protocol, task: Task, console: PlainConsole) -> tuple[Task, dict[str, Any]]:
    """Return the task with the protocol's file, and what was read."""
    if protocol.data is not None:
        with Progress(*_COLUMNS, DownloadColumn(), console=console, transient=True) as progress:
            bar = progress.add_task(protocol.data.file.name, total=protocol.data.file.size, visible=False)

            def show(received: int) -> None:
                progress.update(bar, completed=received, visible=True)

            content = data.read(protocol.data, task.path, show)
        source = {"name": protocol.data.name, "sha256": content.sha256, "is_published": content.is_published}
        return task._replace(content=content), source
    assert protocol.identify is not None
    name, sha256 = protocol.identify(task)
    return task, {"name": name, "sha256": sha256, "is_published": False}


def score(
    protocol: Protocol,
    task: Task,
    items: list[tuple[Item, int]],
    model: Model,
    records: Records,
    label: str,
    part: Part | None,
    console: PlainConsole,
) -> list[Record]:
    """Score the items of a protocol, and show the progress on standard error."""
    done, add = records.done(protocol.name, label), functools.partial(records.add, protocol.name, label)
    with TaskProgress(console, f"{protocol.name}, {model.name}", "tokens") as progress:

        def show(n: int, total: int) -> None:
            progress.show(n, total, n, n)

        return records_of(protocol, task, items, model.scorer, done, add, show, part)


if __name__ == "__main__":
    with exit_with_message():
        main()
