"""The training loop of both backends: batches, learning rates, evaluations and checkpoints."""

import contextlib
import functools
import math
import signal
import time
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity.data.prefetch import prefetch
from parity.data.tokenizer import stream_text
from parity.data.windows import Dataset
from parity.errors import InputError, printable
from parity.storage import manifest as manifests
from parity.storage.manifest import Manifest, weights_file
from parity.training import checkpoints, optimizer_state
from parity.training.job import Job
from parity.training.schedule import learning_rate
from parity.training.stop import StopRequest
from parity.training.trainer import Trainer

SAMPLES_AT_ONCE = 32
"""Number of prompts that an evaluation continues in one batch. Each batch gathers the weights of a mesh."""


class Pending(NamedTuple):
    """A step that was started, whose metrics may still be on the device."""

    step: int
    lr: float
    metrics: dict[str, Any]


def evaluate(trainer: Trainer, dataset: Dataset, batch_size: int) -> float:
    """Return the mean loss in nats per target over the whole dataset."""
    batches = dataset.in_order(batch_size, trainer.local_slice(batch_size))
    sums = [trainer.evaluate_batch(trainer.to_device(*batch)) for batch in batches]
    return math.fsum(map(float, sums)) / dataset.n_targets


def resume_and_train(trainer: Trainer, job: Job, console: Console) -> int:
    """Resume if possible, train, print a summary, and return the exit status."""
    try:
        with job.uploads or contextlib.nullcontext():
            return _resume_and_train(trainer, job, console)
    finally:
        job.run.unlock()


def _resume_and_train(trainer: Trainer, job: Job, console: Console) -> int:
    done = job.resumed_step
    saved_metrics = None
    if job.begin is not None:
        job.begin(trainer, job, console)
    if done is not None:
        folder = checkpoints.step_folder(job.run.checkpoints, done)
        trainer.restore(folder)
        console.print(f"resuming   after step {done}")
        manifest = manifests.read(folder)
        if manifest.metrics_size is not None and manifest.metrics_sha256 is not None:
            saved_metrics = manifest.metrics_size, manifest.metrics_sha256
    job.run.forget_after(-1 if done is None else done, saved_metrics)
    # A run that was killed after a save has not shown that step.
    not_shown = done in job.run.metrics.evaluations and not job.run.has_samples(done or 0)
    if done is not None and job.processes.all_reduce_max(int(job.processes.first and not_shown)):
        _sample_and_plot(trainer, job, done, console)
    if done is not None:
        _upload(job, done)
    started = time.perf_counter()
    status = train_loop(trainer, job, done, console)
    evaluated, best = job.run.metrics.evaluations, job.run.metrics.best_step()
    if best is not None:
        last = max(evaluated)
        baseline = "" if job.bigram is None else f", bigram {job.bigram:.4f}"
        console.print(f"validation loss {evaluated[last]:.4f}{baseline}; {time.perf_counter() - started:.0f} s")
        if best < last:
            console.print(
                f"overfitting: the validation loss was lowest after step {best}, {evaluated[best]:.4f}, and has risen "
                "since; that checkpoint is kept: --checkpoint best"
            )
    console.print(job.use.format(run=job.run.path), highlight=False, soft_wrap=True)
    if job.args.mirror is not None:  # all processes wait together, because none may leave before the others
        job.processes.wait_for_first(lambda seconds: job.uploads is None or job.uploads.finished(seconds))
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
            validation loss is not finite. Earlier checkpoints are kept.
    """
    settings = job.settings
    pending: list[Pending] = []
    summary = TextColumn("{task.fields[summary]}", markup=False)
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), summary)
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with StopRequest() as stop, progress, contextlib.ExitStack() as stack:
        if done is None:
            done = 0
            _evaluate_and_save(trainer, job, done, console)
        bar = progress.add_task("training", total=settings.steps, completed=done, summary="compiling")
        last_time, n_tokens = time.perf_counter(), 0
        batches = stack.enter_context(contextlib.closing(_batches(trainer, job, done)))
        for step, batch in zip(range(done, settings.steps), batches, strict=True):
            lr = learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps)
            pending.append(Pending(step + 1, lr, trainer.train_step(batch, lr, step)))
            finished = step + 1
            n_tokens += settings.batch_size * batch[0].shape[-1]
            evaluating = finished % settings.eval_every == 0 or finished == settings.steps
            reading = evaluating or finished % settings.log_every == 0
            # Several processes must agree to stop, which waits for the device; so only where they wait anyway.
            stopping = job.processes.all_reduce_max(stop.received) if reading or job.processes.count == 1 else 0
            if reading or stopping:
                loss = _log_steps(job, pending, console)
                speed = n_tokens / (time.perf_counter() - last_time)
                progress.update(bar, completed=finished, summary=f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} tokens/s")
                pending.clear()
                last_time, n_tokens = time.perf_counter(), 0
            if evaluating:
                if not console.is_terminal:
                    console.print(f"step {finished:>6}  training loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s")
                _evaluate_and_save(trainer, job, finished, console)
                last_time = time.perf_counter()
            if stopping:
                if not evaluating:
                    _save(trainer, job, finished)
                    _upload(job, finished)
                console.print(f"stopped by {signal.Signals(stopping).name} after step {finished}, which is saved")
                return 128 + stopping
        return 0


def _batches(trainer: Trainer, job: Job, done: int) -> Generator[Sequence[Any], None, None]:
    """Yield the batches of the steps from `done` on, as to_device() returns them, prefetched on another thread."""
    settings = job.settings
    rows = np.arange(settings.batch_size).reshape(-1, job.micro_size)  # [A, B]
    local_rows = rows[:, trainer.local_slice(job.micro_size)]
    flat_rows = local_rows.flatten().tolist()

    def load(step: int) -> Sequence[Any]:
        batch = job.train.batch(settings.seed, step, settings.batch_size, flat_rows)
        arrays = (array.reshape(*local_rows.shape, *array.shape[1:]) for array in batch)  # [A, B, ...]
        return trainer.to_device(*arrays)

    return prefetch(load, range(done, settings.steps))


def _evaluate_and_save(trainer: Trainer, job: Job, step: int, console: Console) -> None:
    loss = evaluate(trainer, job.validation, job.micro_size)
    if not math.isfinite(loss):
        raise InputError(f"step {step}: the validation loss is {loss}; nothing is saved; earlier checkpoints are kept")
    perplexity = {"perplexity": math.exp(min(loss, 700))} if job.loss_unit == "token" else {}
    measured = {} if job.measure is None else job.measure(trainer)
    job.log({"step": step, "validation_loss": loss, **perplexity, **measured})
    more = "".join(f"  {n.replace('_', ' ')} {v:.3f}" for n, v in measured.items() if isinstance(v, int | float))
    first = "".join(f"  {name} {value:.2f}" for name, value in perplexity.items())
    console.print(f"step {step:>6}  validation loss {loss:.4f}{first}{more}", soft_wrap=True)
    _save(trainer, job, step)
    _sample_and_plot(trainer, job, step, console)
    _upload(job, step)


def _sample_and_plot(trainer: Trainer, job: Job, step: int, console: Console) -> None:
    """Write and print samples, and draw the losses: after the save, and without ending the run if it fails."""
    with _without_ending(job, "the samples were not written", console):
        texts = _continuations(trainer, job) if job.sample is None else job.sample(trainer)
        job.run.add_samples(step, texts)
        for text in texts:
            lines = [repr(text)] if job.sample is None else [printable(line, 200) for line in text.splitlines()]
            for line in lines:
                console.print(f"             {line}", style="dim", markup=False, highlight=False, soft_wrap=True)
    with _without_ending(job, "loss.png was not drawn", console):
        job.run.plot(job.bigram, job.loss_unit)


def _continuations(trainer: Trainer, job: Job) -> list[str]:
    """Return the prompts with their continuations."""
    settings = job.settings
    options = {
        "seed": settings.seed,
        "temperature": settings.sample_temperature,
        "top_k": settings.sample_top_k,
        **job.sample_options,
    }
    rows = []
    for first in range(0, len(job.prompts), SAMPLES_AT_ONCE):
        prompts = job.prompts[first : first + SAMPLES_AT_ONCE]
        # The random numbers of each prompt are those that it has alone, in row 0.
        room = [min(settings.sample_tokens, trainer.config.n_ctx - len(prompt)) for prompt in prompts]
        own = [{"row": 0, "max_new_tokens": n} for n in room]
        rows += trainer.generate(prompts, max(room), per_prompt=own, **options)
    # stream_text skips ids without text, of a padded vocabulary.
    return ["".join(stream_text(job.tokenizer, row)) for row in rows]


@contextlib.contextmanager
def _without_ending(job: Job, problem: str, console: Console) -> Generator[None, None, None]:
    """Report an error in this context instead of raising it, unless other processes would then wait for this one."""
    try:
        yield
    except Exception as error:
        if job.processes.count > 1 and not isinstance(error, OSError | UnicodeError | ImportError):
            raise
        console.print(f"{problem}: {type(error).__name__}: {error}", markup=False, style="yellow", soft_wrap=True)


def _save(trainer: Trainer, job: Job, step: int) -> None:
    settings, run = job.settings, job.run
    size, sha256 = run.metrics.flush()
    identity = job.identity

    def describe(files: dict[str, str]) -> Manifest:
        return Manifest(
            files,
            weights_file(files),
            run=identity.run,
            settings=identity.settings,
            metrics_size=size,
            metrics_sha256=sha256,
        )

    checkpoints.save(
        run.checkpoints,
        step,
        trainer.save,
        settings.keep,
        settings.keep_every,
        run.metrics.best_step(),
        () if job.uploads is None else job.uploads.held(),
        job.processes,
        describe,
        functools.partial(optimizer_state.read_back, config=trainer.config, stored=trainer.stored),
    )


def _upload(job: Job, step: int) -> None:
    """Request the upload of a checkpoint, and of the run's files as they are now, if the run is mirrored."""
    if job.uploads is not None:
        job.uploads.request(step)


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
    inputs, *_ = job.train.batch(settings.seed, step - 1, settings.batch_size)
    texts = {name: str(value) for name, value in values.items()}  # JSON has no NaN
    entries = {"step": step, "lr": lr, **texts, "windows": windows, "inputs": inputs.tolist()}
    file = job.run.write(f"nonfinite-{step:06d}.json", entries)
    job.log({"step": step, "lr": lr, "nonfinite": texts})
    message = f"step {step}: {texts}, not finite; its batch is in {file}"
    skipped = len(job.run.metrics.nonfinite)
    if skipped > settings.skip_nonfinite:
        raise InputError(
            f"{message}. The run stops; earlier checkpoints are kept. Resume from the newest with --resume "
            f"--skip-nonfinite {skipped}, or start again with a lower --lr or --dtype float32"
        )
    console.print(f"{message}; the step is skipped ({skipped} of {settings.skip_nonfinite})", style="yellow")
