"""The engine: a thread that owns the model of one backend and decodes in one batch what clients request.

Rows that wait at the same moment form a batch. When rows have ended or were cancelled and others wait, the batch is
formed again, as soon as the free places have cost as much as this does: the tokens that the remaining rows have so far
become their prompts. A token is a function of the row's
seed, number and position, and of the text before it, so that a row has the same tokens in every batch, up to rounding.
"""

import asyncio
import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from parity.data.tokenizer import Tokenizer
from parity.errors import InputError
from parity.generation import Chunk, Request
from parity.sampling import check_options
from parity.serving.batch import MOST_TOP, Batch
from parity.serving.rows import Generation, Row, WaitingRow


class BusyError(Exception):
    """The engine has as many waiting rows or calls as it accepts."""


class ClosedError(Exception):
    """The engine was closed before the request was finished."""


class FailedError(Exception):
    """The model cannot decode; the message says why."""


class _Call(NamedTuple):
    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    future: "asyncio.Future[Any]"
    loop: asyncio.AbstractEventLoop


class Engine:
    """A thread that owns one backend's model; nothing else may call the model.

    Args:
        name: Name of the model in the API.
        backend: The package gpt_torch or gpt_jax.
        serving: The backend's module `serving`.
        model: A GPTModel of the backend. Functions that `call` runs may use it.
        tokenizer: Its tokenizer.
        max_batch: Largest number of rows that are decoded at the same time.
        max_waiting: Largest number of rows that wait for a place, and of calls that wait for their turn.
        description: What runs the model, for people: device, framework, dtype.
        template: The template (parity.tuning.template) of a model that was tuned on instructions.
    """

    def __init__(
        self,
        name: str,
        backend: Any,
        serving: Any,
        model: Any,
        tokenizer: Tokenizer,
        *,
        max_batch: int = 16,
        max_waiting: int = 256,
        description: str = "",
        template: str | None = None,
    ):
        self.name = name
        self.backend = backend
        self.model = model
        self.tokenizer = tokenizer
        self.config = model.config
        self.description = description
        self.template = template
        self.max_batch = max_batch
        self.max_waiting = max_waiting
        self.serving = serving
        self._decoder: Any = None
        self._changed = threading.Condition()
        self._calls: deque[_Call] = deque()
        self._waiting: deque[WaitingRow] = deque()
        self._batch: Batch | None = None
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name=f"engine {name}", daemon=True)
        self._thread.start()

    @property
    def is_ready(self) -> bool:
        """Whether the engine accepts requests."""
        return self._thread.is_alive() and not self._is_closed

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """The number of rows in the batch that are not finished or cancelled."""
        batch = self._batch
        return 0 if batch is None else len(batch.running)

    def submit(self, rows: Sequence[Row], n_top: int = 0) -> Generation:
        """Decode continuations; call this in an asyncio event loop.

        Args:
            rows: The continuations.
            n_top: Number of the most likely tokens to deliver for each new token, at most MOST_TOP.

        Returns:
            The Generation, from which the event loop receives text and tokens. If nobody iterates over it until its
            end, call its `cancel`.

        Raises:
            InputError: For an empty prompt, an id out of range, options out of range, and more tokens than the context
                has; the message names which.
            BusyError: If too many rows wait already.
            ClosedError: If the engine was closed.
        """
        if not 0 <= n_top <= MOST_TOP:
            raise InputError(f"the number of most likely tokens must be in 0..{MOST_TOP}, got {n_top}")
        for row in rows:
            self.check(row)
        generation = Generation(rows, n_top, self._forget)
        with self._changed:
            if not self.is_ready:
                raise ClosedError
            if len(self._waiting) + len(rows) > self.max_waiting:
                raise BusyError
            self._waiting.extend(WaitingRow(generation, index, self.tokenizer) for index in range(len(rows)))
            self._changed.notify_all()
        return generation

    async def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Run function(*arguments) on the engine's thread, between two steps of decoding, and return its result.

        The function may use the model. It delays all continuations that are being decoded, so it must be short.

        Raises:
            BusyError: If too many calls wait already.
            ClosedError: If the engine was closed.
            Exception: What the function raises.
        """
        loop = asyncio.get_running_loop()
        call = _Call(function, arguments, loop.create_future(), loop)
        with self._changed:
            if not self.is_ready:
                raise ClosedError
            if len(self._calls) >= self.max_waiting:
                raise BusyError
            self._calls.append(call)
            self._changed.notify_all()
        return await call.future

    def shapes(self) -> list[tuple[int, int]]:
        """The numbers of rows and of tokens per prompt with which `warm_up` should be called."""
        return self.serving.shapes(self.max_batch, self.config.n_ctx)

    def warm_up(self, n_rows: int, length: int) -> None:
        """Decode a batch, so that its programs are compiled; call this before the server accepts requests."""
        n_new = min(8, self.config.n_ctx)
        prompt = [0] * min(length, self.config.n_ctx + 1 - n_new)
        asyncio.run(_drain(self, [Row(prompt, n_new, {"row": row}) for row in range(n_rows)]))

    def weights_changed(self) -> None:
        """Decode with the model's new weights from now on; call this on the engine's thread.

        Rows that have tokens of the old weights raise FailedError.
        """
        self._decoder = None
        self._fail(FailedError("the model's weights were replaced by those of another checkpoint"))

    def close(self) -> None:
        """Stop the thread after its current step. Requests that are not finished raise ClosedError."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def check(self, row: Row) -> None:
        """Raise the InputError that `submit` raises for a row."""
        if not row.prompt:
            raise InputError("the prompt is empty; start with the end-of-text token to generate from nothing")
        self.config.check_tokens((1, min(len(row.prompt), self.config.n_ctx)), min(row.prompt), max(row.prompt))
        check_options({**row.options, "max_new_tokens": row.max_new_tokens}, self.config.n_vocab)
        if len(row.prompt) + row.max_new_tokens > self.config.n_ctx + 1:
            raise InputError(
                f"the prompt has {len(row.prompt)} tokens and {row.max_new_tokens} more were requested, but the "
                f"model's context has {self.config.n_ctx}"
            )

    def _forget(self, generation: Generation) -> None:
        with self._changed:
            if any(row.generation is generation for row in self._waiting):
                self._waiting = deque(row for row in self._waiting if row.generation is not generation)
            self._changed.notify_all()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._calls or self._waiting or self._batch or self._is_closed)
                if self._is_closed:
                    break
                call = self._calls.popleft() if self._calls else None
            if call is not None:
                _run(call)
            try:
                self._decode()
            except Exception as error:  # such as logits that are not finite, or too little memory
                self._fail(error)
        with self._changed:
            for call in self._calls:
                _answer(call, error=ClosedError())
            rows = [*(self._batch.rows if self._batch else []), *self._waiting]
        for row in rows:
            row.generation.deliver(ClosedError())

    def _decode(self) -> None:
        """Decode a few tokens of each row of the batch, after forming it if necessary."""
        batch = self._batch
        n_running = 0 if batch is None else len(batch.running)
        n_idle = min(self.max_batch - n_running, len(self._waiting))
        size = self.serving.batch_size(max(1, n_running + n_idle), self.max_batch)
        if batch is None or n_running == 0 or (n_idle and batch.may_form_again(size)):
            rows = [] if batch is None else batch.running
            self._batch = batch = None  # frees its cache
            with self._changed:
                while self._waiting and len(rows) < self.max_batch:
                    rows.append(self._waiting.popleft())
            if not rows:
                return
            self._batch = batch = Batch(rows)
            batch.start(self.config, self._decode_batch, self.serving.batch_size(len(rows), self.max_batch))
            n_idle = 0
        batch.step(n_idle)

    def _decode_batch(self, request: Request) -> Iterator[Chunk]:
        if self._decoder is None:
            self._decoder = self.serving.for_serving(self.model)
        return self.serving.decode(self._decoder, request)

    def _fail(self, error: Exception) -> None:
        batch, self._batch = self._batch, None
        for row in batch.running if batch else []:
            row.generation.is_cancelled = True
            row.generation.deliver(FailedError(str(error)) if isinstance(error, InputError) else error)


def _run(call: _Call) -> None:
    if call.future.cancelled():
        return
    try:
        result = call.function(*call.arguments)
    except Exception as error:
        _answer(call, error=error)
    else:
        _answer(call, result)


def _answer(call: _Call, result: Any = None, error: Exception | None = None) -> None:
    def set_result() -> None:
        if call.future.done():  # nobody waits any more
            return
        if error is None:
            call.future.set_result(result)
        else:
            call.future.set_exception(error)

    with contextlib.suppress(RuntimeError):  # the event loop is closed
        call.loop.call_soon_threadsafe(set_result)


async def _drain(engine: Engine, rows: Sequence[Row]) -> None:
    async for _ in engine.submit(rows):
        pass
