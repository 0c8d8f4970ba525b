"""The engine of the server: the same tokens in every batch, cancelled rows, calls, errors and its end."""

import asyncio
import dataclasses
import importlib

import numpy as np
import pytest
from support.models import probing_weights

from parity.config import PRESETS
from parity.data.tokenizer import ByteTokenizer
from parity.serving.engine import Engine
from parity.serving.rows import Row

CONFIG = dataclasses.replace(PRESETS["tiny"], n_vocab=257, n_ctx=64)


def new_engine(name, **options):
    backend = importlib.import_module(f"gpt_{name}")
    model = backend.GPTModel(CONFIG)
    backend.load_weights(model, probing_weights(CONFIG, np.float32))
    serving = importlib.import_module(f"gpt_{name}.serving")
    return Engine(f"tiny-{name}", backend, serving, model, ByteTokenizer(), **options)


@pytest.fixture(scope="module", params=["torch", "jax"])
def engine(request):
    engine = new_engine(request.param, max_batch=4, max_waiting=12)
    yield engine
    engine.close()


async def collect(generation):
    """{row: (text, ids, reason)}, from the progress that is delivered."""
    rows = {index: ["", [], None] for index in range(len(generation.rows))}
    async for index, text, tokens, reason in generation:
        assert rows[index][2] is None, "nothing follows the end"
        rows[index][0] += text
        rows[index][1] += [token.id for token in tokens]
        rows[index][2] = reason
    return {index: tuple(row) for index, row in rows.items()}


def expected(engine, row):
    new = engine.backend.generate(engine.model, [row.prompt], row.max_new_tokens, per_prompt=[row.options])[0]
    new = new[len(row.prompt) :]
    is_stopped = new[-1] == row.options.get("eos_id")
    new = new[:-1] if is_stopped else new
    return engine.tokenizer.decode(new), new, "stop" if is_stopped else "length"


def mixed_rows(count, seed=0):
    generator = np.random.default_rng(seed)
    options = [
        {},
        {"temperature": 0},
        {"temperature": 0.7, "top_k": 20},
        {"top_p": 0.8, "min_p": 0.01, "repetition_penalty": 1.2},
    ]
    return [
        Row(
            generator.integers(0, 256, generator.integers(1, 30)).tolist(),
            int(generator.integers(1, 34)),
            {**options[number % len(options)], "seed": number, "row": number % 3, "eos_id": 256},
        )
        for number in range(count)
    ]


def test_each_row_has_the_tokens_of_generate(engine):
    rows = mixed_rows(10)

    async def requests():
        generations = [engine.submit(rows[:3]), engine.submit(rows[3:4]), engine.submit(rows[4:])]
        return await asyncio.gather(*map(collect, generations))

    answers = [row for answer in asyncio.run(requests()) for row in answer.values()]
    assert answers == [expected(engine, row) for row in rows]
    assert engine.n_running == engine.n_waiting == 0
