"""`benchmark.py run`: a training run from the start of the process to its end, composed of its parts.

A slice is some steps and then what an evaluation does; the slices of gpt_jax and nanoGPT take turns.
"""

import contextlib
import dataclasses
import functools
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any, NamedTuple

from measure import starting
from measure.args import Args
from measure.report import Measurement
from measure.timing import Peer, Spec, Timings, Workload, first_calls, peak_resident
from parity.errors import InputError
from parity.training.settings import recipe

NANOGPT = "shakespeare-char-cpu"
"""The preset of nanoGPT's run; the others are measured without a peer."""
TWO_DEVICES = {"JAX_NUM_CPU_DEVICES": "2"}
"""The environment in which JAX divides the CPU into two devices."""
_TEXT_SIZE, _N_CHARACTERS = 1_115_394, 65  # of tiny-shakespeare

Parts = Mapping[str, float]
"""Seconds by part: of one step, and of one evaluation, save, batch of samples and picture."""


class Contestant(NamedTuple):
    """One of the programs whose runs are compared."""

    slices: Spec
    """Its workload returns the Parts of a slice."""
    process: Spec
    """The whole run."""
    start: Spec
    """A process that makes one step."""
    counts: Mapping[str, int]
    """How often a run does each part."""
    counts_in_start: Mapping[str, int]
    """How often the process `start` does each part."""


def run(args: Args) -> list[Measurement]:
    """Measure a training run of gpt_jax, on one device and on two, and of nanoGPT for its own preset.

    With --whole the runs are also measured as whole processes.
    """
    if args.gpu:
        raise InputError("run measures on the CPU only; leave --gpu out")
    preset = args.preset or NANOGPT
    settings, model = recipe(preset).settings, recipe(preset).model
    with tempfile.TemporaryDirectory() as name:
        contestants = _contestants(args, preset, Path(name))
        parts, peaks = _measure_slices(contestants, args.rounds)
        starts = {name: contestant.start for name, contestant in contestants.items()}
        first_calls(starts, 1)  # fills the compilation cache
        processes = first_calls(starts, min(args.rounds, 3))
        composed, notes = {}, []
        for name, contestant in contestants.items():
            medians = {part: statistics.median(slice[part] for slice in parts[name]) for part in contestant.counts}
            start = max(0.0, processes[name].median - _total(contestant.counts_in_start, medians))
            seconds = [start + _total(contestant.counts, slice) for slice in parts[name]]
            composed[name] = Timings(seconds, *peaks[name])
            notes.append(f"{name}: {_describe(contestant.counts, medians, start)}")
        title = f"Training run: {preset}, {settings.steps:,} steps, evaluated every {settings.eval_every}"
        tokens = settings.steps * settings.batch_size * model.n_ctx
        measurements = [Measurement(f"{title}, composed of its parts", "run", tokens, "tokens", composed, notes)]
        if args.whole:
            whole = first_calls({name: contestant.process for name, contestant in contestants.items()}, 1)
            notes = [f"{name}: its parts explain {composed[name].median / whole[name].median:.1%}" for name in whole]
            measurements.append(Measurement(f"{title}, whole", "run", tokens, "tokens", whole, notes))
    return measurements


def _contestants(args: Args, preset: str, folder: Path) -> dict[str, Contestant]:
    settings, n_steps = recipe(preset).settings, 10 * args.calls
    text = folder / "text.txt"
    write_text(text)
    ours: tuple[str, ...] = ("--preset", preset, "--corpus", str(text))
    if settings.tokenizer == "gpt2":  # which would need a file
        ours += ("--tokenizer", "bytes", "--n-vocab", str(recipe(preset).model.n_vocab))
    evaluations = settings.steps // settings.eval_every + 1
    events = ("evaluation", "save", "samples", "picture")
    on_two = ("--mesh", "data=2", "--unroll", str(recipe(preset).model.n_layer), "--remat", "none")
    contestants = {}
    for name, more, environment in (("gpt_jax", (), {}), ("gpt_jax, two devices", on_two, TWO_DEVICES)):
        spec = functools.partial(args.spec, environment=environment)
        in_folder = (*ours, *more, "--run", "run")
        contestants[name] = Contestant(
            spec(jax_slices, ours, folder / name, n_steps, bool(more)),
            spec(starting.script, folder, "train_jax.py", in_folder),
            spec(starting.script, folder, "train_jax.py", (*in_folder, "--steps", "1")),
            {"step": settings.steps, **dict.fromkeys(events, evaluations)},
            {"step": 1, **dict.fromkeys(events, 2)},
        )
    if preset == NANOGPT:
        theirs = (str(text), "--out", "nanogpt", "--threads", str(args.threads))
        process = functools.partial(args.spec, starting.script, folder)
        contestants["nanoGPT"] = Contestant(
            args.spec(nanogpt_slices, text, folder / "nanogpt", args.threads, n_steps),
            process("measure/nanogpt.py", theirs),
            process("measure/nanogpt.py", (*theirs, "--steps", "0")),
            {"step": settings.steps + 1, "evaluation": evaluations, "save": evaluations - 1},
            {"step": 1, "evaluation": 1},
        )
    return contestants


def _measure_slices(
    contestants: Mapping[str, Contestant], rounds: int
) -> tuple[dict[str, list[Parts]], dict[str, tuple[int, str]]]:
    """Return {name: Parts of each slice} and {name: (peak memory, device)}."""
    parts: dict[str, list[Parts]] = {name: [] for name in contestants}
    with contextlib.ExitStack() as stack:
        peers = {name: stack.enter_context(Peer(name, contestants[name].slices)) for name in contestants}
        for is_counted in [False] + [True] * rounds:  # the first round compiles
            for name, peer in peers.items():
                measured = peer.call()
                if is_counted:
                    parts[name].append(measured)
        return parts, {name: (peer.peak(), peer.device) for name, peer in peers.items()}


def _total(counts: Mapping[str, int], parts: Parts) -> float:
    return sum(count * parts[part] for part, count in counts.items())


def _describe(counts: Mapping[str, int], parts: Parts, start: float) -> str:
    """Return the seconds and the share of each part."""
    seconds = {"start": start, **{f"{count} x {part}": count * parts[part] for part, count in counts.items()}}
    total = sum(seconds.values())
    shares = (f"{part} {value:.1f} s ({value / total:.0%})" for part, value in seconds.items())
    return f"{total:.1f} s: {', '.join(shares)}; {1e3 * parts['step']:.1f} ms per step"


def write_text(file: Path) -> None:
    """Write a text with the size and the number of different characters of tiny-shakespeare, without a download."""
    text = "\n\n".join(topics[name] for name in sorted(topics))
    ascii_only = Counter(character for character in text if character.isascii())
    kept = {character for character, _ in ascii_only.most_common(_N_CHARACTERS)}
    text = "".join(character if character in kept else " " for character in text)
    file.write_text((text * (_TEXT_SIZE // len(text) + 1))[:_TEXT_SIZE], encoding="utf-8")


# In the processes of the peers


def jax_slices(arguments: Sequence[str], folder: Path, n_steps: int, on_two: bool) -> Workload:
    """Slices of the run that train_jax.py makes with these arguments: its own loop, whose parts are timed."""
    from gpt_jax.sharding import MeshShape, make_mesh
    from gpt_jax.train import Trainer
    from parity.console import PlainConsole
    from parity.training import checkpoints, loop
    from parity.training.args import JobArgs, parse_job_args
    from parity.training.job import load_job, start_run
    from parity.training.runs import RunFolder

    console = PlainConsole(quiet=True)
    job = load_job(parse_job_args(JobArgs, None, [*arguments, "--run", str(folder)]))
    unroll, remat = recipe(job.args.preset).program(job.config.n_layer, "cpu")
    mesh = make_mesh(MeshShape(data=2)) if on_two else None
    unroll, remat = (job.config.n_layer, "none") if on_two else (unroll, remat)
    trainer = Trainer(job.config, job.settings, unroll=unroll, mesh=mesh, remat=remat)
    job = start_run(job, "jax", {}, console)
    seconds: defaultdict[str, float] = defaultdict(float)
    _time_calls_of(loop, "evaluate", "evaluation", seconds)
    _time_calls_of(checkpoints, "save", "save", seconds)
    _time_calls_of(Trainer, "generate", "samples", seconds)
    _time_calls_of(RunFolder, "plot", "picture", seconds)
    done: int | None = None

    def call() -> Parts:
        nonlocal done
        last = (done or 0) + n_steps
        settings = dataclasses.replace(job.settings, steps=last, eval_every=last)
        seconds.clear()
        begin = time.perf_counter()
        loop.train_loop(trainer, dataclasses.replace(job, settings=settings), done, console)
        steps = time.perf_counter() - begin - sum(seconds.values())
        done = last
        return {"step": steps / n_steps, **seconds}

    return Workload(call, peak_resident, "cpu")


def _time_calls_of(owner: Any, function: str, part: str, seconds: defaultdict[str, float]) -> None:
    """Replace a function by one that adds the seconds that it takes to those of the part."""
    original: Callable[..., Any] = getattr(owner, function)

    @functools.wraps(original)
    def timed(*arguments: Any, **options: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(*arguments, **options)
        finally:
            seconds[part] += time.perf_counter() - begin

    setattr(owner, function, timed)


def nanogpt_slices(text: Path, folder: Path, threads: int, n_steps: int) -> Workload:
    from measure.nanogpt import Run

    run, done = Run(text, folder, threads), 0

    def call() -> Parts:
        nonlocal done
        parts = run.slice(done, n_steps)
        done += n_steps
        return {**parts, "step": parts["steps"] / n_steps}

    return Workload(call, peak_resident, "cpu")
