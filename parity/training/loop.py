"""The training loop: which batch, which learning rate, when to evaluate and save, for any backend."""

import contextlib
import math
import signal
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity.config import GPTConfig
from parity.data.prefetch import prefetch
from parity.data.windows import Windows
from parity.errors import InputError
from parity.training import checkpoints
from parity.training.job import Job
from parity.training.schedule import learning_rate


class Trainer(Protocol):
    """What a backend brings: a model with its optimizer, and what to do with them."""

    config: GPTConfig

    def local_slice(self, size: int) -> slice:
        """Which rows of `size` this process computes: all, where it is the only one."""

    def to_device(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
        """int32 [..., B, T], local_slice() of the rows, on their way to the device; may be called on another thread."""

    def train_step(self, inputs: Any, targets: Any, lr: float, step: int) -> dict[str, Any]:
        """One optimizer step on the A micro-batches of to_device(): {loss, grad_norm}, maybe still on the device.

        Where one of them is not finite, the model and its optimizer stay as they were.
        """

    def evaluate_batch(self, inputs: Any, targets: Any) -> Any:
        """Summed loss in nats, of all processes, of what to_device() returned of [B, T]; without dropout."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> list[list[int]]: ...

    def save(self, folder: Path) -> None:
        """Write everything that the run needs to go on, and model.safetensors with config.json.

        All processes call it, with the same folder.
        """

    def restore(self, folder: Path) -> None:
        """Take up what either backend's save() wrote; raises InputError for another model's."""


class StopRequest:
    """Ctrl-C or SIGTERM once: finish the step, save and stop; a second time: stop at once."""

    def __init__(self) -> None:
        self.received = 0
        """The signal's number"""

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number


class Pending(NamedTuple):
    """A step that was started; its metrics may still be on the device."""

    step: int
    lr: float
    metrics: dict[str, Any]


def evaluate(trainer: Trainer, windows: Windows, batch_size: int) -> float:
    """Mean loss in nats over every target of the windows' tokens."""
    batches = windows.in_order(batch_size, trainer.local_slice(batch_size))
    sums = [trainer.evaluate_batch(*trainer.to_device(*batch)) for batch in batches]
    return math.fsum(map(float, sums)) / windows.n_targets


def resume_and_train(trainer: Trainer, job: Job, console: Console) -> int:
    """Restore what there is, train, and say what came of it; returns the exit status."""
    done = None
    if job.is_resuming:
        # The first process says which; the others need not read all of it.
        found = int(checkpoints.newest_intact(job.run.checkpoints).name) if job.processes.first else 0
        done = job.processes.all_reduce_max(found)
        trainer.restore(checkpoints.step_folder(job.run.checkpoints, done))
        console.print(f"resuming   after step {done}")
    job.run.forget_after(-1 if done is None else done)
    begin = time.perf_counter()
    status = train_loop(trainer, job, done, console)
    evaluated = {e["step"]: e["validation_loss"] for e in job.run.metrics() if "validation_loss" in e}
    last, best = max(evaluated), job.run.best_step()
    beside = "" if job.bigram is None else f", bigram {job.bigram:.4f}"
    console.print(f"validation loss {evaluated[last]:.4f}{beside}; {time.perf_counter() - begin:.0f} s")
    if best is not None and best < last:
        console.print(
            f"overfitting: the validation loss was lowest after step {best}, {evaluated[best]:.4f}, and rose since; "
            "that checkpoint is kept: --checkpoint best"
        )
    console.print(
        f'sample from it: python scripts/generate.py --run {job.run.path} "The "', highlight=False, soft_wrap=True
    )
    return status


def train_loop(trainer: Trainer, job: Job, done: int | None, console: Console) -> int:
    """Train from step `done`, or from the beginning, to the end.

    Returns the exit status: 0, or 128 + the signal that stopped it. Raises InputError for a loss that is not
    finite, once the settings' skip_nonfinite steps are used up; what was saved before stays.
    """
    settings = job.settings
    tokens_a_step = settings.batch_size * job.train.n_ctx
    pending: list[Pending] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with StopRequest() as stop, progress, contextlib.ExitStack() as stack:
        if done is None:
            done = 0
            _evaluate_and_save(trainer, job, done, console)
        bar = progress.add_task("training", total=settings.steps, completed=done, shown="compiling")
        since, since_step = time.perf_counter(), done
        batches = stack.enter_context(contextlib.closing(_batches(trainer, job, done)))
        for step, (inputs, targets) in zip(range(done, settings.steps), batches, strict=True):
            lr = learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps)
            pending.append(Pending(step + 1, lr, trainer.train_step(inputs, targets, lr, step)))
            finished = step + 1
            evaluating = finished % settings.eval_every == 0 or finished == settings.steps
            reading = evaluating or finished % settings.log_every == 0
            # Several processes must agree, which waits for the device: where they do that anyway.
            stopping = job.processes.all_reduce_max(stop.received) if reading or job.processes.count == 1 else 0
            if reading or stopping:
                loss = _log_steps(job, pending, console)
                speed = (finished - since_step) * tokens_a_step / (time.perf_counter() - since)
                progress.update(bar, completed=finished, shown=f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} tokens/s")
                pending.clear()
                since, since_step = time.perf_counter(), finished
            if evaluating:
                if not console.is_terminal:
                    console.print(f"step {finished:>6}  training loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s")
                _evaluate_and_save(trainer, job, finished, console)
                since = time.perf_counter()
            if stopping:
                if not evaluating:
                    _save(trainer, job, finished)
                console.print(f"stopped by {signal.Signals(stopping).name} after step {finished}, which is saved")
                return 128 + stopping
        return 0


def _batches(trainer: Trainer, job: Job, done: int) -> Generator[tuple[Any, Any], None, None]:
    """The batches of the steps from `done` on, as to_device() returns them, made ahead of their use."""
    settings, n_ctx = job.settings, job.train.n_ctx
    places = np.arange(settings.batch_size).reshape(settings.accumulate, job.micro_size)  # [A, B]
    ours = places[:, trainer.local_slice(job.micro_size)]
    flat = ours.flatten().tolist()

    def load(step: int) -> tuple[Any, Any]:
        parts = job.train.batch(settings.seed, step, settings.batch_size, flat)
        return trainer.to_device(*(part.reshape(*ours.shape, n_ctx) for part in parts))

    return prefetch(load, range(done, settings.steps))


def _evaluate_and_save(trainer: Trainer, job: Job, step: int, console: Console) -> None:
    loss = evaluate(trainer, job.validation, job.micro_size)
    if not math.isfinite(loss):
        raise InputError(f"step {step}: the validation loss is {loss}; nothing is saved, earlier checkpoints are kept")
    perplexity = math.exp(min(loss, 700))
    job.log({"step": step, "validation_loss": loss, "perplexity": perplexity})
    console.print(f"step {step:>6}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")
    for prompt in job.prompts:
        room = min(job.settings.sample_tokens, trainer.config.n_ctx - len(prompt))
        [row] = trainer.generate([prompt], room, job.settings.seed)
        text = job.tokenizer.decode(row)
        job.run.add_sample(step, text)
        console.print(f"             {text!r}", style="dim", markup=False, highlight=False, soft_wrap=True)
    job.run.plot(job.bigram)
    _save(trainer, job, step)


def _save(trainer: Trainer, job: Job, step: int) -> None:
    settings, folder, best = job.settings, job.run.checkpoints, job.run.best_step()
    checkpoints.save(folder, step, trainer.save, settings.keep, settings.keep_every, best, job.processes)


def _log_steps(job: Job, pending: Sequence[Pending], console: Console) -> float:
    """Write the steps' metrics, which waits for the device; the last finite loss, or NaN."""
    last = math.nan
    for step, lr, metrics in pending:
        values = {name: float(value) for name, value in metrics.items()}
        if all(map(math.isfinite, values.values())):
            job.log({"step": step, "lr": lr, **values})
            last = values["loss"]
        else:
            _note_not_finite(job, step, lr, values, console)
    return last


def _note_not_finite(job: Job, step: int, lr: float, values: dict[str, float], console: Console) -> None:
    """Write the step and its batch down; raises InputError if it is one too many."""
    settings = job.settings
    windows = job.train.batch_windows(settings.seed, step - 1, settings.batch_size)
    inputs, _ = job.train.batch(settings.seed, step - 1, settings.batch_size)
    words = {name: str(value) for name, value in values.items()}  # JSON has no NaN
    entries = {"step": step, "lr": lr, **words, "windows": windows, "inputs": inputs.tolist()}
    file = job.run.write(f"nonfinite-{step:06d}.json", entries)
    job.log({"step": step, "lr": lr, "nonfinite": words})
    told = f"step {step}: {words}, not finite; its batch is in {file}"
    skipped = sum("nonfinite" in entry for entry in job.run.metrics())
    if skipped > settings.skip_nonfinite:
        raise InputError(
            f"{told}. The run stops; checkpoints saved before are kept. Go on from the newest with --resume "
            f"--skip-nonfinite {skipped}, or start again with a lower --lr or --dtype float32"
        )
    console.print(f"{told}; the step is passed over ({skipped} of {settings.skip_nonfinite})", style="yellow")
