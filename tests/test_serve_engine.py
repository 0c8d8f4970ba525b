"""The engine of the server: the same tokens in every batch, cancelled rows, calls between steps, limits, its end."""

import asyncio
import gc
import threading

import numpy as np
import pytest
from support.models import probing_weights
from support.served import CONFIG, new_engine, tiny_model

from parity.data.tokenizer import ByteTokenizer, stream_text
from parity.errors import InputError
from parity.serving.batch import Batch
from parity.serving.engine import BusyError, ClosedError, FailedError
from parity.serving.rows import Generation, Row, WaitingRow
from parity.serving.text import TextStream

EOS = ByteTokenizer.eos_id


@pytest.fixture(scope="module")
def engine():
    engine = new_engine("torch", max_waiting=40)
    yield engine
    engine.close()


async def collect(generation):
    """[(text, ids, finish reason)] of the rows, from the progress that is delivered."""
    rows = [["", [], None] for _ in generation.rows]
    async for index, text, tokens, reason in generation:
        assert rows[index][2] is None, "nothing follows the end"
        rows[index][0] += text
        rows[index][1] += [token.id for token in tokens]
        rows[index][2] = reason
    return list(map(tuple, rows))


def expected(row):
    backend, model = tiny_model("torch")
    new = backend.generate(model, [row.prompt], row.max_new_tokens, per_prompt=[row.options])[0][len(row.prompt) :]
    is_stopped = new[-1] == row.options.get("eos_id")
    text = "".join(stream_text(ByteTokenizer(), new[:-1] if is_stopped else new))
    return text, new, "stop" if is_stopped else "length"


def mixed_rows(count, seed=0):
    generator = np.random.default_rng(seed)
    rules = [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
    ]
    return [
        Row(
            generator.integers(0, 256, generator.integers(1, 30)).tolist(),
            int(generator.integers(1, 34)),
            {**rules[number % len(rules)], "seed": number, "row": number % 3, "eos_id": EOS},
        )
        for number in range(count)
    ]


@pytest.mark.parametrize("name", ["torch", "jax"])
def test_rows_have_the_tokens_of_generate_in_batches_that_change(name):
    rows = mixed_rows(11)
    engine = new_engine(name)

    async def requests():
        generations = [engine.submit(rows[:2]), engine.submit(rows[2:7]), engine.submit(rows[7:])]
        return await asyncio.gather(*map(collect, generations))

    try:
        answers = [row for answer in asyncio.run(requests()) for row in answer]
    finally:
        engine.close()
    assert answers == [expected(row) for row in rows]
    assert (engine.n_running, engine.n_waiting) == (0, 0)


@pytest.mark.slow
def test_after_the_warm_up_plain_requests_compile_nothing():
    from gpt_jax import generation_loop, serving

    programs = (generation_loop._start, generation_loop._cached_loop, generation_loop._lengthened)
    assert serving.shapes(16, 1024)[-5:] == [(1, 256), (4, 256), (1, 512), (4, 512), (1, 1024)]
    engine = new_engine("jax")
    assert engine.shapes() == [(1, 32), (4, 32), (1, 64), (4, 64)]
    for shape in engine.shapes():
        engine.warm_up(*shape)
    compiled = [program._cache_size() for program in programs]
    rows = [
        Row([1] * length, 30, {"seed": 1, "temperature": number % 2}) for number, length in enumerate((1, 16, 17, 30))
    ]

    async def requests():
        for count in (1, 3, 4):
            await asyncio.gather(*(collect(engine.submit([row])) for row in rows[:count]))

    asyncio.run(requests())
    engine.close()
    assert [program._cache_size() for program in programs] == compiled


class Held:
    """Holds the engine's thread before the second step of each batch, until `go` is set; notes the sizes of batches."""

    def __init__(self, engine, monkeypatch):
        self.sizes, self.go = [], threading.Event()
        self._decode = engine.serving.decode
        monkeypatch.setattr(engine.serving, "decode", self._held)

    def _held(self, model, request):
        self.sizes.append(len(request.prompts))
        for chunk in self._decode(model, request):
            yield chunk
            assert self.go.wait(60)


def test_rows_that_wait_join_a_batch_with_free_places(engine, monkeypatch):
    held = Held(engine, monkeypatch)
    long, short = Row([1], 20, {"seed": 1}), Row([2, 3], 2, {"seed": 2})

    async def requests():
        first = engine.submit([long])
        events = aiter(first)
        parts = [await anext(events)]  # the first token; the batch is held now
        second = asyncio.ensure_future(collect(engine.submit([short])))
        await asyncio.sleep(0)
        held.go.set()
        async for part in events:
            parts.append(part)
        return await second, "".join(part.text for part in parts)

    answer, text = asyncio.run(requests())
    assert held.sizes == [1, 2]
    assert (answer, text) == ([expected(short)], expected(long)[0])


def test_a_batch_is_formed_again_when_free_places_have_cost_as_much(engine):
    """Reading 2 rows of 64 slots, of the 32 tokens and the new ones, takes as long as 128 / 5 = 26 tokens."""
    model = tiny_model("torch")[1]

    async def allowed():
        row = WaitingRow(Generation([Row([1] * 32, 32)], 0, lambda _: None), 0, engine.tokenizer)
        batch = Batch([row])
        batch.start(CONFIG, lambda request: engine.serving.decode(model, request), 1)
        answers = []
        for n_idle in [0] * 4 + [1] * 10 + [2] * 8:
            batch.step(n_idle)
            answers.append(batch.may_form_again(2))
        return answers

    assert asyncio.run(allowed()) == [False] * 21 + [True]


async def block(engine):
    """Occupy the engine's thread; return the function that ends this."""
    started, end = threading.Event(), threading.Event()

    def wait():
        started.set()
        assert end.wait(60)

    call = asyncio.ensure_future(engine.call(wait))
    assert await asyncio.to_thread(started.wait, 60)

    async def unblock():
        end.set()
        await call

    return unblock


def test_a_cancelled_row_frees_its_place(engine, monkeypatch):
    """The others of its batch go on, and one that waits takes its place."""
    held = Held(engine, monkeypatch)
    rows = [Row([number], 20, {"seed": number}) for number in range(5)]

    async def requests():
        unblock = await block(engine)
        leaving = [engine.submit([row]) for row in rows[:3]]
        staying, waiting = (asyncio.ensure_future(collect(engine.submit([row]))) for row in rows[3:])
        await unblock()
        await anext(aiter(leaving[0]))
        assert (engine.n_running, engine.n_waiting) == (4, 1)
        for generation in leaving:
            generation.cancel()
        assert (engine.n_running, engine.n_waiting) == (1, 1)
        held.go.set()
        return await asyncio.gather(staying, waiting)

    assert asyncio.run(requests()) == [[expected(rows[3])], [expected(rows[4])]]
    assert held.sizes == [4, 2]


def test_the_end_of_an_iteration_cancels(engine):
    async def requests():
        generation = engine.submit([Row([1], 60), Row([2], 60)])
        async for _ in generation:
            break
        del _
        gc.collect()  # ends the iterator of this loop
        await asyncio.sleep(0)
        return generation

    assert asyncio.run(requests()).is_cancelled


def test_calls_run_on_the_engines_thread_between_steps(engine, monkeypatch):
    held = Held(engine, monkeypatch)
    threads, order = set(), []

    def function(number):
        threads.add(threading.current_thread().name)
        order.append(number)
        return number, engine.n_running

    async def requests():
        generation = engine.submit([Row([1], 20, {"seed": 3})])
        events = aiter(generation)
        parts = [await anext(events)]
        calls = [asyncio.ensure_future(engine.call(function, number)) for number in range(5)]
        await asyncio.sleep(0)
        held.go.set()
        results = await asyncio.gather(*calls)
        return results, "".join([part.text for part in parts] + [part.text async for part in events])

    results, text = asyncio.run(requests())
    assert results == [(number, 1) for number in range(5)], "the row was still decoded"
    assert order == list(range(5))
    assert threads == {"engine tiny-torch"}
    assert text == expected(Row([1], 20, {"seed": 3}))[0]


def test_what_a_call_raises_reaches_its_caller(engine):
    def fail():
        raise InputError("no such layer")

    async def requests():
        with pytest.raises(InputError, match="no such layer"):
            await engine.call(fail)
        return await engine.call(lambda: 3)

    assert asyncio.run(requests()) == 3


def test_limits_of_the_queue(engine):
    async def requests():
        unblock = await block(engine)
        generations = [engine.submit([Row([1], 1)] * 10) for _ in range(4)]
        with pytest.raises(BusyError):
            engine.submit([Row([1], 1)])
        generations[0].cancel()
        generations[0] = engine.submit([Row([1], 1)] * 10)
        calls = [asyncio.ensure_future(engine.call(int)) for _ in range(40)]
        await asyncio.sleep(0)
        with pytest.raises(BusyError):
            await engine.call(int)
        await unblock()
        await asyncio.gather(*calls, *map(collect, generations))

    asyncio.run(requests())


def test_bad_rows_are_refused_in_the_call(engine):
    for row, message in [
        (Row([], 1), "the prompt is empty"),
        (Row([257], 1), "outside the vocabulary|in 0..256"),
        (Row([1] * 65, 1), "the model's context has 64"),
        (Row([1] * 60, 6), "the prompt has 60 tokens and 6 more were requested, but the model's context has 64"),
        (Row([1], 0), "max_new_tokens must be in"),
        (Row([1], 1, {"top_p": 2}), "top_p must be in"),
    ]:
        with pytest.raises(InputError, match=message):
            engine.submit([row])
    with pytest.raises(InputError, match=r"most likely tokens must be in 0\.\.20, got 21"):
        engine.submit([Row([1], 1)], n_top=21)
    assert engine.n_waiting == 0


def test_the_longest_prompt_has_one_new_token(engine):
    row = Row([1] * CONFIG.n_ctx, 1, {"seed": 5})

    async def request():
        return await collect(engine.submit([row]))

    assert asyncio.run(request()) == [expected(row)]


def test_new_weights_are_never_mixed_with_the_old_ones(monkeypatch):
    """A row that has tokens of the old weights ends with an error, and one that waits gets the new ones."""
    backend = tiny_model("torch")[0]
    model = backend.GPTModel(CONFIG)
    backend.load_weights(model, probing_weights(CONFIG, np.float32, seed=1))
    engine = new_engine("torch", backend=backend, model=model)
    held = Held(engine, monkeypatch)

    def replace():
        backend.load_weights(model, probing_weights(CONFIG, np.float32))
        engine.weights_changed()

    async def requests():
        unblock = await block(engine)
        running, waiting = engine.submit([Row([1], 20)] * 4), engine.submit([Row([1], 20, {"seed": 7})])
        await unblock()
        events = aiter(running)
        await anext(events)
        change = asyncio.ensure_future(engine.call(replace))
        await asyncio.sleep(0)
        held.go.set()
        await change
        with pytest.raises(FailedError, match="weights were replaced"):
            async for _ in events:
                pass
        return await collect(waiting)

    assert asyncio.run(requests()) == [expected(Row([1], 20, {"seed": 7}))]
    engine.close()


def test_a_closed_engine_ends_its_requests():
    engine = new_engine("torch")

    async def requests():
        unblock = await block(engine)
        generations = [engine.submit([Row([1], 60)] * 4), engine.submit([Row([1], 60)] * 4)]
        call = asyncio.ensure_future(engine.call(int))
        closing = asyncio.ensure_future(asyncio.to_thread(engine.close))
        while engine.is_ready:
            await asyncio.sleep(0)
        await unblock()
        await closing
        for generation in generations:
            with pytest.raises(ClosedError):
                await collect(generation)
        with pytest.raises(ClosedError):
            await call
        with pytest.raises(ClosedError):
            engine.submit([Row([1], 1)])
        with pytest.raises(ClosedError):
            await engine.call(int)

    asyncio.run(requests())
    assert not engine.is_ready


def test_requests_of_an_event_loop_that_was_closed_end():
    engine = new_engine("torch")

    async def request():
        engine.submit([Row([1], 60)])

    asyncio.run(request())  # the row is decoded meanwhile
    assert asyncio.run(collect_new(engine)) == [expected(Row([1], 3))]
    engine.close()


async def collect_new(engine):
    return await collect(engine.submit([Row([1], 3)]))


def test_text_before_a_stop_text_is_never_delivered_and_taken_back():
    """Whatever the tokens, the parts are those of the text up to its first stop text."""
    generator = np.random.default_rng(0)
    for _ in range(300):
        ids = generator.choice(list("ab\N{ROCKET}é".encode()), 12).tolist()
        stop = ["".join(generator.choice(list("ab"), generator.integers(1, 4))) for _ in range(2)]
        whole = "".join(stream_text(ByteTokenizer(), ids))
        ends = [whole.index(text) for text in stop if text in whole]
        stream, parts, tokens = TextStream(ByteTokenizer(), stop), [], []
        for number, id in enumerate(ids):
            stream.add(id, 0.0, ())
            is_last = stream.is_stopped or number == len(ids) - 1
            if is_last:
                stream.end()
            text, new = stream.release(is_last)
            parts.append(text)
            tokens += new
            if is_last:
                break
        assert "".join(parts) == whole[: min(ends, default=len(whole))]
        assert stream.is_stopped == bool(ends)
        assert [token.id for token in tokens] == ids[: len(tokens)]
        if not ends:
            assert len(tokens) == len(ids)
