"""The training loop of both backends: batches, learning rates, evaluations and checkpoints."""

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
from parity.data.tokenizer import stream_text
from parity.data.windows import Dataset
from parity.errors import InputError
from parity.training import checkpoints
from parity.training.job import Job
from parity.training.schedule import learning_rate


class Trainer(Protocol):
    """A model with its optimizer, as a backend implements it."""

    config: GPTConfig

    def local_slice(self, size: int) -> slice:
        """Return the slice of a batch of `size` rows that this process computes (all of it in a one-process run)."""

    def to_device(self, inputs: np.ndarray, targets: np.ndarray) -> tuple[Any, Any]:
        """Start the transfer of a batch to the device.

        Called on another thread than the other methods.

        Args:
            inputs: Token ids int32 [..., B, T] of the rows in local_slice().
            targets: The token ids to predict, of the same shape; IGNORE_INDEX where there is none.
        """

    def train_step(self, inputs: Any, targets: Any, lr: float, step: int) -> dict[str, Any]:
        """Make one optimizer step.

        If the loss or the gradient is not finite, the model and the optimizer stay as they were.

        Args:
            inputs: What to_device() returned for ids [A, B, T], A micro-batches.
            targets: The same for the targets.
            lr: Learning rate of the step.
            step: Number of the step, from 0; dropout depends on it.

        Returns:
            "loss", in nats per target, and "grad_norm", before clipping; both may still be on the device.
        """

    def evaluate_batch(self, inputs: Any, targets: Any) -> Any:
        """Return the loss in nats, without dropout, summed over the targets of all processes.

        Args:
            inputs: What to_device() returned for ids [B, T].
            targets: The same for the targets.
        """

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        """Continue prompts; the options are those of the backend's `generate`."""

    def save(self, folder: Path) -> None:
        """Write model.safetensors with config.json, and whatever else a resumed run needs.

        All processes call it with the same folder.
        """

    def restore(self, folder: Path) -> None:
        """Load what the save() of either backend wrote; raises InputError if it is another model's."""


class StopRequest:
    """Receive SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed).

    The first one stops the run after a save, a second one stops it at once. SIGHUP stays ignored if it was, as nohup
    does it.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, or 0."""

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number


class Pending(NamedTuple):
    """A step that was started, whose metrics may still be on the device."""

    step: int
    lr: float
    metrics: dict[str, Any]


def evaluate(trainer: Trainer, dataset: Dataset, batch_size: int) -> float:
    """Return the mean loss in nats per target over the whole dataset."""
    batches = dataset.in_order(batch_size, trainer.local_slice(batch_size))
    sums = [trainer.evaluate_batch(*trainer.to_device(*batch)) for batch in batches]
    return math.fsum(map(float, sums)) / dataset.n_targets


def resume_and_train(trainer: Trainer, job: Job, console: Console) -> int:
    """Resume if possible, train, print a summary, and return the exit status."""
    done = None
    if job.is_resuming:
        # Only the first process verifies the checkpoints, which means reading all of their files.
        newest = int(checkpoints.newest_intact(job.run.checkpoints).name) if job.processes.first else 0
        done = job.processes.all_reduce_max(newest)
        trainer.restore(checkpoints.step_folder(job.run.checkpoints, done))
        console.print(f"resuming   after step {done}")
    job.run.forget_after(-1 if done is None else done)
    started = time.perf_counter()
    status = train_loop(trainer, job, done, console)
    evaluated = {e["step"]: e["validation_loss"] for e in job.run.metrics() if "validation_loss" in e}
    last, best = max(evaluated), job.run.best_step()
    baseline = "" if job.bigram is None else f", bigram {job.bigram:.4f}"
    console.print(f"validation loss {evaluated[last]:.4f}{baseline}; {time.perf_counter() - started:.0f} s")
    if best is not None and best < last:
        console.print(
            f"overfitting: the validation loss was lowest after step {best}, {evaluated[best]:.4f}, and has risen "
            "since; that checkpoint is kept: --checkpoint best"
        )
    console.print(
        f'sample from it: python scripts/generate.py --run {job.run.path} "The "', highlight=False, soft_wrap=True
    )
    return status


def train_loop(trainer: Trainer, job: Job, done: int | None, console: Console) -> int:
    """Train to the last step.

    Args:
        trainer: The model and its optimizer.
        job: The job.
        done: Number of steps that were made before; None starts with an evaluation of the initial weights.
        console: Where to print.

    Returns:
        The exit status: 0, or 128 + the number of the signal that stopped the run.

    Raises:
        InputError: If more steps than settings.skip_nonfinite have a loss or gradient that is not finite, or a
            validation loss is not finite. Checkpoints saved before are kept.
    """
    settings = job.settings
    tokens_per_step = settings.batch_size * job.train.n_ctx
    pending: list[Pending] = []
    summary = TextColumn("{task.fields[summary]}", markup=False)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), summary)
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with StopRequest() as stop, progress, contextlib.ExitStack() as stack:
        if done is None:
            done = 0
            _evaluate_and_save(trainer, job, done, console)
        bar = progress.add_task("training", total=settings.steps, completed=done, summary="compiling")
        last_time, last_step = time.perf_counter(), done
        batches = stack.enter_context(contextlib.closing(_batches(trainer, job, done)))
        for step, (inputs, targets) in zip(range(done, settings.steps), batches, strict=True):
            lr = learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps)
            pending.append(Pending(step + 1, lr, trainer.train_step(inputs, targets, lr, step)))
            finished = step + 1
            evaluating = finished % settings.eval_every == 0 or finished == settings.steps
            reading = evaluating or finished % settings.log_every == 0
            # Several processes must agree to stop, which waits for the device; so only where they wait anyway.
            stopping = job.processes.all_reduce_max(stop.received) if reading or job.processes.count == 1 else 0
            if reading or stopping:
                loss = _log_steps(job, pending, console)
                speed = (finished - last_step) * tokens_per_step / (time.perf_counter() - last_time)
                progress.update(bar, completed=finished, summary=f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} tokens/s")
                pending.clear()
                last_time, last_step = time.perf_counter(), finished
            if evaluating:
                if not console.is_terminal:
                    console.print(f"step {finished:>6}  training loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s")
                _evaluate_and_save(trainer, job, finished, console)
                last_time = time.perf_counter()
            if stopping:
                if not evaluating:
                    _save(trainer, job, finished)
                console.print(f"stopped by {signal.Signals(stopping).name} after step {finished}, which is saved")
                return 128 + stopping
        return 0


def _batches(trainer: Trainer, job: Job, done: int) -> Generator[tuple[Any, Any], None, None]:
    """Yield the batches of the steps from `done` on, as to_device() returns them, prefetched on another thread."""
    settings, n_ctx = job.settings, job.train.n_ctx
    rows = np.arange(settings.batch_size).reshape(settings.accumulate, job.micro_size)  # [A, B]
    local_rows = rows[:, trainer.local_slice(job.micro_size)]
    flat_rows = local_rows.flatten().tolist()

    def load(step: int) -> tuple[Any, Any]:
        inputs, targets = job.train.batch(settings.seed, step, settings.batch_size, flat_rows)
        shape = (*local_rows.shape, n_ctx)  # [A, B, T]
        return trainer.to_device(inputs.reshape(shape), targets.reshape(shape))

    return prefetch(load, range(done, settings.steps))


def _evaluate_and_save(trainer: Trainer, job: Job, step: int, console: Console) -> None:
    loss = evaluate(trainer, job.validation, job.micro_size)
    if not math.isfinite(loss):
        raise InputError(f"step {step}: the validation loss is {loss}; nothing is saved; earlier checkpoints are kept")
    perplexity = math.exp(min(loss, 700))
    job.log({"step": step, "validation_loss": loss, "perplexity": perplexity})
    console.print(f"step {step:>6}  validation loss {loss:.4f}  perplexity {perplexity:.2f}")
    for prompt in job.prompts:
        room = min(job.settings.sample_tokens, trainer.config.n_ctx - len(prompt))
        options = {"temperature": job.settings.sample_temperature, "top_k": job.settings.sample_top_k}
        [row] = trainer.generate([prompt], room, seed=job.settings.seed, **options)
        text = "".join(stream_text(job.tokenizer, row))
        job.run.add_sample(step, text)
        console.print(f"             {text!r}", style="dim", markup=False, highlight=False, soft_wrap=True)
    job.run.plot(job.bigram)
    _save(trainer, job, step)


def _save(trainer: Trainer, job: Job, step: int) -> None:
    settings, folder, best = job.settings, job.run.checkpoints, job.run.best_step()
    checkpoints.save(folder, step, trainer.save, settings.keep, settings.keep_every, best, job.processes)


def _log_steps(job: Job, pending: Sequence[Pending], console: Console) -> float:
    """Write the metrics of the steps, which waits for the device; return the last finite loss, or NaN."""
    last = math.nan
    for step, lr, metrics in pending:
        values = {name: float(value) for name, value in metrics.items()}
        if all(map(math.isfinite, values.values())):
            job.log({"step": step, "lr": lr, **values})
            last = values["loss"]
        else:
            _record_nonfinite(job, step, lr, values, console)
    return last


def _record_nonfinite(job: Job, step: int, lr: float, values: dict[str, float], console: Console) -> None:
    """Record the step and its batch; raises InputError if more steps than allowed were not finite."""
    settings = job.settings
    windows = job.train.batch_windows(settings.seed, step - 1, settings.batch_size)
    inputs, _ = job.train.batch(settings.seed, step - 1, settings.batch_size)
    texts = {name: str(value) for name, value in values.items()}  # JSON has no NaN
    entries = {"step": step, "lr": lr, **texts, "windows": windows, "inputs": inputs.tolist()}
    file = job.run.write(f"nonfinite-{step:06d}.json", entries)
    job.log({"step": step, "lr": lr, "nonfinite": texts})
    message = f"step {step}: {texts}, not finite; its batch is in {file}"
    skipped = sum("nonfinite" in entry for entry in job.run.metrics())
    if skipped > settings.skip_nonfinite:
        raise InputError(
            f"{message}. The run stops; checkpoints saved before are kept. Resume from the newest with --resume "
            f"--skip-nonfinite {skipped}, or start again with a lower --lr or --dtype float32"
        )
    console.print(f"{message}; the step is skipped ({skipped} of {settings.skip_nonfinite})", style="yellow")
