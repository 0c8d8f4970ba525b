"""The training loop: which batch, which learning rate, when to evaluate and save, for any backend."""

import math
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from parity import checkpoints
from parity.config import GPTConfig
from parity.data import NO_TARGET, Windows
from parity.errors import InputError
from parity.runs import RunFolder
from parity.schedule import learning_rate
from parity.settings import TrainSettings
from parity.tokenizer import Tokenizer, encode_prompt


class Trainer(Protocol):
    """What a backend brings: a model with its optimizer, and what to do with them."""

    config: GPTConfig

    def train_step(self, inputs: np.ndarray, targets: np.ndarray, lr: float, step: int) -> dict[str, Any]:
        """One optimizer step on int32 [A, B, T], A micro-batches; {loss, grad_norm}, maybe still on the device."""

    def loss_sum(self, inputs: np.ndarray, targets: np.ndarray) -> Any:
        """Summed loss in nats of int32 [B, T], without dropout, maybe still on the device."""

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, seed: int) -> list[list[int]]: ...

    def save(self, folder: Path) -> None:
        """Write everything that the run needs to go on, and model.safetensors with config.json."""

    def restore(self, folder: Path) -> None: ...


class StopRequest:
    """Ctrl-C or SIGTERM once: finish the step, save and stop; a second time: stop at once."""

    def __init__(self) -> None:
        self.received: int | None = None

    def __enter__(self) -> "StopRequest":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received is not None:
            raise KeyboardInterrupt
        self.received = number

    @property
    def exit_status(self) -> int:
        return 0 if self.received is None else 128 + self.received


def evaluate(trainer: Trainer, windows: Windows, batch_size: int) -> float:
    """Mean loss in nats over every target of the windows' tokens."""
    sums, count = [], 0
    for inputs, targets in windows.in_order(batch_size):
        sums.append(trainer.loss_sum(inputs, targets))
        count += int((targets != NO_TARGET).sum())
    return float(np.sum(np.asarray([float(value) for value in sums], np.float64)) / count)


def fit(
    trainer: Trainer,
    run: RunFolder,
    settings: TrainSettings,
    train: Windows,
    validation: Windows,
    tokenizer: Tokenizer | None,
    bigram: float | None,
    done: int,
    console: Console,
) -> int:
    """Train from step `done` to the end; returns the exit status: 0, or 128 + the signal that stopped it.

    Raises InputError for a loss that is not finite; what was saved before stays.
    """
    micro_size = settings.batch_size // settings.accumulate
    tokens_a_step = settings.batch_size * train.n_ctx

    def evaluate_and_save(step: int) -> None:
        loss = evaluate(trainer, validation, micro_size)
        run.log({"step": step, "validation_loss": loss, "perplexity": math.exp(min(loss, 700))})
        console.print(f"step {step:>6}  validation loss {loss:.4f}  perplexity {math.exp(min(loss, 700)):.2f}")
        if tokenizer is not None:
            _sample(trainer, run, settings, tokenizer, step, console)
        run.plot(bigram)
        checkpoints.save(run.checkpoints, step, trainer.save, settings.keep)

    pending: list[tuple[int, float, dict[str, Any]]] = []
    columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"))
    progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
    with StopRequest() as stop, progress:
        bar = progress.add_task("training", total=settings.steps, completed=done, shown="compiling")
        if done == 0:
            evaluate_and_save(0)
        since, since_step = time.perf_counter(), done
        for step in range(done, settings.steps):
            inputs, targets = (
                part.reshape(settings.accumulate, micro_size, train.n_ctx)
                for part in train.batch(settings.seed, step, settings.batch_size)
            )
            lr = learning_rate(step, settings.lr, settings.min_lr, settings.warmup, settings.steps)
            pending.append((step + 1, lr, trainer.train_step(inputs, targets, lr, step)))
            finished = step + 1
            evaluating = finished % settings.eval_every == 0 or finished == settings.steps
            if evaluating or stop.received is not None or finished % settings.log_every == 0:
                loss = _log_steps(run, pending)
                speed = (finished - since_step) * tokens_a_step / (time.perf_counter() - since)
                progress.update(bar, completed=finished, shown=f"loss {loss:.3f}  lr {lr:.1e}  {speed:,.0f} tokens/s")
                pending.clear()
                since, since_step = time.perf_counter(), finished
            if evaluating:
                if not console.is_terminal:
                    console.print(f"step {finished:>6}  training loss {loss:.4f}  lr {lr:.2e}  {speed:,.0f} tokens/s")
                evaluate_and_save(finished)
                since = time.perf_counter()
            if stop.received is not None:
                if not evaluating:
                    checkpoints.save(run.checkpoints, finished, trainer.save, settings.keep)
                console.print(f"stopped by {signal.Signals(stop.received).name} after step {finished}, which is saved")
                break
        return stop.exit_status


def _log_steps(run: RunFolder, pending: Sequence[tuple[int, float, dict[str, Any]]]) -> float:
    """Write the steps' metrics, which waits for the device; the last loss."""
    for step, lr, metrics in pending:
        values = {name: float(value) for name, value in metrics.items()}
        if not all(map(math.isfinite, values.values())):
            raise InputError(
                f"step {step}: {values}, not finite; the checkpoints before it are kept. "
                "Try a lower --settings.lr, or --settings.dtype float32"
            )
        run.log({"step": step, "lr": lr, **values})
    return values["loss"]


def _sample(
    trainer: Trainer, run: RunFolder, settings: TrainSettings, tokenizer: Tokenizer, step: int, console: Console
) -> None:
    prompt = list(encode_prompt(tokenizer, settings.sample_prompt))
    room = trainer.config.n_ctx - len(prompt)
    if room < 1:
        raise InputError(f"sample_prompt has {len(prompt)} tokens, the context is {trainer.config.n_ctx}; shorten it")
    [row] = trainer.generate([prompt], min(settings.sample_tokens, room), settings.seed)
    text = tokenizer.decode(row)
    run.add_sample(step, text)
    console.print(f"             {text!r}", style="dim", markup=False, highlight=False, soft_wrap=True)
