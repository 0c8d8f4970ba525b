"""The same weights, options and seed give the same tokens in both backends, and those that the oracle chooses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import numpy_oracle as oracle
from support.models import TINY, probing_weights
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import gpt_jax
import gpt_torch
from gpt_jax.generation_loop import _cached_loop, _start
from gpt_jax.loss import calc_loss
from parity.errors import InputError
from parity.sampling import RowOptions, check_options, row_options, uniforms

PROMPTS = [[5], [1, 2, 3], [90, 0, 7, 7, 31, 2, 4]]
OPTIONS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 0.6, "top_k": 7},
    {"temperature": 1.3, "top_p": 0.8},
    {"temperature": 0.9, "top_k": 40, "top_p": 0.95},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0, "repetition_penalty": 1.5},
    {"temperature": 1.1, "min_p": 0.1},
    {"temperature": 0.9, "top_k": 30, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
]


@functools.cache
def models():
    pair = gpt_torch.GPTModel("tiny"), gpt_jax.GPTModel("tiny")
    for package, model in zip((gpt_torch, gpt_jax), pair, strict=True):
        package.load_weights(model, probing_weights(TINY, np.float32))
    return pair


def by_oracle(prompt, row, new, options, seed, context_size=TINY.n_ctx):
    """No cache, no padding, float64."""
    weights = probing_weights(TINY)
    tokens = list(prompt)
    for u in uniforms([seed], [row], [len(prompt)], new)[0]:
        logits = oracle.logits(TINY, weights, np.array([tokens[-context_size:]]))[0, -1]
        tokens.append(oracle.choose(logits, u, tokens, **options))
    return tokens


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_same_tokens_in_both_and_by_the_oracle(options):
    ours_torch, ours_jax = models()
    for seed in range(3):
        want = [by_oracle(prompt, row, 16, options, seed) for row, prompt in enumerate(PROMPTS)]
        assert gpt_torch.generate(ours_torch, PROMPTS, 16, seed=seed, **options) == want
        assert gpt_jax.generate(ours_jax, PROMPTS, 16, seed=seed, **options) == want


def choose_by_both(logits, seen, u, options):
    """The tokens that torch and JAX choose; `options`: a dict for each row."""
    rows, active = row_options([check_options(own, logits.shape[1]) for own in options], logits.shape[1])
    tokens = []
    with jax.enable_x64(True):
        for package, array in ((gpt_torch, torch.from_numpy), (gpt_jax, jnp.asarray)):
            arguments = array(logits), array(seen), array(u), RowOptions(*map(array, rows)), active
            tokens.append(package.sampling.choose(*arguments).tolist())
    return tokens


def test_seeds_differ_and_repeat():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        a, b, c = (package.generate(model, PROMPTS, 12, seed=seed) for seed in (1, 1, 2))
        assert a == b != c


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_choose_against_the_oracle(options):
    """Many rows, ties among them, and uniforms at both ends."""
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(500, 97)) * 3
    logits[::3] = np.round(logits[::3])  # ties
    seen = generator.random((500, 97)) < 0.3
    u = np.concatenate([[0.0, 1 - 2.0**-24], generator.random(498)]).astype(np.float32)
    want = [
        oracle.choose(row, x, np.flatnonzero(s), **options)
        for row, s, x in zip(logits, seen, u.astype(np.float64), strict=True)
    ]
    assert choose_by_both(logits, seen, u, [options] * len(logits)) == [want, want]


@pytest.mark.parametrize("options", [options for options in OPTIONS if options["temperature"] > 0], ids=str)
def test_keeps_what_the_logits_processors_of_hugging_face_keep(options):
    generator = np.random.default_rng(1)
    logits = (generator.normal(size=(200, 97)) * 3).astype(np.float32)
    ids = generator.integers(0, 97, (200, 12))
    processors = LogitsProcessorList()
    if "repetition_penalty" in options:
        processors.append(RepetitionPenaltyLogitsProcessor(options["repetition_penalty"]))
    processors.append(TemperatureLogitsWarper(options["temperature"]))
    for name, processor in (("top_k", TopKLogitsWarper), ("top_p", TopPLogitsWarper), ("min_p", MinPLogitsWarper)):
        if name in options:
            processors.append(processor(options[name]))
    theirs = processors(torch.from_numpy(ids), torch.from_numpy(logits)).softmax(dim=-1).numpy()
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    rows, active = row_options([check_options(options, 97)] * 200, 97)
    both = []
    for package, array in ((gpt_torch, torch.from_numpy), (gpt_jax, jnp.asarray)):
        ours, by_row = array(logits), RowOptions(*map(array, rows))
        if active.repetition_penalty:
            ours = package.sampling.apply_repetition_penalty(ours, array(seen), by_row)
        both.append(np.asarray(package.sampling.filtered_probs(ours, by_row, active)))
    for probs in both:
        np.testing.assert_array_equal(probs > 0, theirs > 0)
        np.testing.assert_allclose(probs / probs.sum(axis=1, keepdims=True), theirs, rtol=2e-5, atol=1e-9)


def test_stop_sequences_end_a_row_with_their_last_token():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        whole = package.generate(model, PROMPTS, 16, seed=4)
        stop = [whole[0][5:8], whole[2][10:11], [96] * 30]
        rows = package.generate(model, PROMPTS, 16, seed=4, stop=stop)
        for prompt, row, cut in zip(PROMPTS, whole, rows, strict=True):
            ends = [
                end
                for end in range(len(prompt) + 1, len(row) + 1)
                if any(end - len(s) >= len(prompt) and row[end - len(s) : end] == s for s in stop)
            ]
            assert cut == row[: ends[0] if ends else None]
        assert rows[0] == whole[0][:8]
        # a stop that begins in the prompt is none
        assert package.generate(model, [[1, 2, 3]], 4, seed=4, stop=[[3, whole[1][3]]])[0][:3] == [1, 2, 3]
        assert len(package.generate(model, PROMPTS[:2], 16, seed=4, stop=[[3, whole[1][3]]])[1]) == 19


def test_samples_are_rows_of_their_own_and_parts_make_the_whole():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        rows = package.generate(model, PROMPTS, 8, samples=3, seed=5)
        assert rows == package.generate(model, [p for p in PROMPTS for _ in range(3)], 8, seed=5)
        assert len({tuple(row) for row in rows}) == 9
        assert rows[3:6] == package.generate(model, PROMPTS[1:2], 8, samples=3, seed=5, first_row=3)


@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[-1]], ids=str)
def test_a_row_does_not_depend_on_its_neighbours(options):
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        together = package.generate(model, PROMPTS, 17, seed=6, **options)
        alone = [package.generate(model, [p], 17, seed=6, first_row=i, **options)[0] for i, p in enumerate(PROMPTS)]
        assert together == alone


def test_logprobs_are_the_models_own():
    weights = probing_weights(TINY)
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        rows, logprobs = package.generate(
            model, PROMPTS, 9, seed=1, top_k=5, temperature=0.5, eos_id=3, return_logprobs=True
        )
        for prompt, row, got in zip(PROMPTS, rows, logprobs, strict=True):
            z = oracle.logits(TINY, weights, np.array([row]))[0, len(prompt) - 1 : -1]
            want = z - np.log(np.exp(z).sum(-1, keepdims=True))
            want = np.take_along_axis(want, np.array(row[len(prompt) :])[:, None], 1)[:, 0]
            np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("every", [1, 3, 100])
def test_stream_yields_what_generate_returns(every):
    options = {"seed": 4, "top_p": 0.9}
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        eos = package.generate(model, PROMPTS, 30, **options)[1][9]
        whole = package.generate(model, PROMPTS, 30, eos_id=eos, **options)
        steps = list(package.stream(model, PROMPTS, 30, eos_id=eos, every=every, **options))
        for row, (prompt, want) in enumerate(zip(PROMPTS, whole, strict=True)):
            tokens = [step[row] for step in steps]
            length = len(want) - len(prompt)
            assert tokens[:length] == want[len(prompt) :]
            assert set(tokens[length:]) <= {None}


@pytest.mark.parametrize("context_size", [9, pytest.param(None, marks=pytest.mark.slow)])
@pytest.mark.parametrize("options", [OPTIONS[0], OPTIONS[1], OPTIONS[-1]], ids=str)
def test_beyond_the_context_is_cropped_as_in_the_notebook(options, context_size):
    """TINY holds 24 positions; 50 new tokens."""
    for seed in range(2):
        want = [
            by_oracle(prompt, row, 50, options, seed, context_size or TINY.n_ctx) for row, prompt in enumerate(PROMPTS)
        ]
        for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
            assert package.generate(model, PROMPTS, 50, context_size, seed=seed, **options) == want


def test_the_repetition_penalty_knows_the_part_of_a_prompt_that_is_cropped():
    options = {"temperature": 0, "repetition_penalty": 3.0}
    prompts = [list(range(0, 90, 2)), [5, 6], list(range(0, 90, 3))]
    want = [by_oracle(prompt, row, 8, options, 0, context_size=6) for row, prompt in enumerate(prompts)]
    forgetful = by_oracle(prompts[0][-6:], 0, 8, options, 0, context_size=6)
    assert want[0][-8:] != forgetful[-8:]
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        assert package.generate(model, prompts, 8, 6, **options) == want


def test_overflow_stop_ends_where_the_context_is_full():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        cropped = package.generate(model, PROMPTS, 50)
        stopped = package.generate(model, PROMPTS, 50, overflow="stop")
        assert stopped == [row[: TINY.n_ctx] for row in cropped]
        full = [[1] * TINY.n_ctx]
        assert package.generate(model, full, 5, overflow="stop") == full


# The other options are parts of these, and test_same_tokens_in_both_and_by_the_oracle has all of them.
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(options, marks=() if number in (0, 4, 6, 8) else pytest.mark.slow)
        for number, options in enumerate(OPTIONS)
    ],
    ids=str,
)
def test_float64_equals_exactly_cached_and_cropped(options):
    weights = probing_weights(TINY)
    with jax.enable_x64(True):
        rows = [
            package.generate(package.adapter.build(TINY, weights), PROMPTS, 40, seed=8, **options)
            for package in (gpt_torch, gpt_jax)
        ]
    want = [by_oracle(prompt, row, 40, options, 8) for row, prompt in enumerate(PROMPTS)]
    assert rows == [want, want]


def test_the_notebooks_functions():
    ids = [[5, 6, 7], [1, 2, 3]]
    ours_torch, ours_jax = models()
    for package, model, array in (
        (gpt_torch, ours_torch, torch.tensor(ids)),
        (gpt_jax, ours_jax, jnp.asarray(ids)),
    ):
        greedy = package.generate(model, ids, 30, temperature=0)
        out = package.generate_text_simple(model=model, idx=array, max_new_tokens=30, context_size=TINY.n_ctx)
        assert type(out) is type(array)
        assert out.dtype == array.dtype
        assert out.tolist() == greedy
        assert package.generate(model=model, idx=array, max_new_tokens=30, context_size=24).tolist() == greedy
        sampled = package.generate(model, array, 9, 24, 1.4, 25)
        assert sampled.tolist() == package.generate(model, ids, 9, temperature=1.4, top_k=25)
        eos = greedy[0][8]
        cut = package.generate(model, array[:1], 30, 24, eos_id=eos).tolist()[0]
        assert cut == greedy[0][: greedy[0].index(eos, 3)]
        long = array.repeat(1, 20) if package is gpt_torch else jnp.tile(array, (1, 20))
        assert package.generate_text_simple(model, long, 2, 24).shape == (2, 62)


def test_logits_that_are_not_finite_name_the_step():
    for package in (gpt_torch, gpt_jax):
        weights = probing_weights(TINY, np.float32)
        weights["wpe.weight"][5] = np.nan
        with pytest.warns(UserWarning, match="not finite"):
            model = package.adapter.build(TINY, weights)
        with pytest.raises(InputError, match="not finite at new token 4"):
            package.generate(model, [[1, 2]], 10)
        with pytest.raises(InputError, match="not finite at new token 0"):
            package.generate(model, [[1] * 6], 10)
        assert len(package.generate(model, [[1, 2]], 4)[0]) == 6


def test_cut_after_eos():
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        whole = package.generate(model, PROMPTS, 16, seed=4)
        eos = whole[1][6]
        for prompt, row, cut in zip(
            PROMPTS, whole, package.generate(model, PROMPTS, 16, seed=4, eos_id=eos), strict=True
        ):
            new = row[len(prompt) :]
            assert cut == prompt + (new[: new.index(eos) + 1] if eos in new else new)


def test_a_bucket_compiles_once():
    model = models()[1]
    gpt_jax.generate(model, [[1, 2]], 3)
    before = _start._cache_size(), _cached_loop._cache_size()
    for prompt, new, seed, temperature in [([1], 16, 1, 0.7), ([3] * 8, 9, 2, 1.5), ([4] * 7, 1, 3, 1.0)]:
        gpt_jax.generate(model, [prompt], new, seed=seed, temperature=temperature)
        list(gpt_jax.stream(model, [prompt], new, seed=seed, temperature=temperature))
    assert (_start._cache_size(), _cached_loop._cache_size()) == before


def test_a_decoding_model_generates_and_refuses_what_needs_the_gpt_model(tmp_path):
    model = models()[1]
    decoder = gpt_jax.for_decoding(model)
    assert gpt_jax.for_decoding(decoder) is decoder
    assert gpt_jax.generate(decoder, PROMPTS, 9, seed=2) == gpt_jax.generate(model, PROMPTS, 9, seed=2)
    assert list(gpt_jax.stream(decoder, PROMPTS, 9, seed=2)) == list(gpt_jax.stream(model, PROMPTS, 9, seed=2))
    tokens = jnp.asarray(PROMPTS[1:2])
    for misuse in (
        lambda: decoder(tokens),
        lambda: jax.jit(gpt_jax.GPTModel.__call__)(decoder, tokens),
        lambda: calc_loss(decoder, tokens, tokens),
        lambda: gpt_jax.run_with_cache(decoder, tokens),
        lambda: gpt_jax.save_pretrained(decoder, tmp_path / "saved"),
        lambda: gpt_jax.export_weights(decoder),
        lambda: gpt_jax.load_weights(decoder, gpt_jax.export_weights(model)),
    ):
        with pytest.raises(InputError, match="use the GPTModel that it was made from"):
            misuse()
    assert not hasattr(model, "decode")


def test_torch_mode_is_restored():
    model = gpt_torch.GPTModel({**TINY.to_dict(), "drop_rate": 0.5}).train()
    a, b = (gpt_torch.generate(model, PROMPTS, 5) for _ in range(2))
    assert a == b
    assert model.training


def test_noise_depends_on_seed_row_and_position_only():
    whole = uniforms([7] * 4, range(4), [0] * 4, 50)
    part = uniforms([7] * 2, [2, 0], [10, 49], 1)
    assert part[:, 0].tolist() == [whole[2, 10], whole[0, 49]]
    assert whole.dtype == np.float32
    assert whole.min() >= 0
    assert whole.max() < 1
    assert len(np.unique(whole)) > 190
    many = uniforms([0] * 3, range(3), [0] * 3, 100_000)
    assert many.mean(axis=1) == pytest.approx([0.5] * 3, abs=0.005)


def test_every_seed_and_row_in_range_gives_numbers_of_its_own():
    ends = [0, 1, 2**32, 2**63 - 1, 2**63, 2**64 - 2, 2**64 - 1]
    pairs = [(seed, row) for seed in ends for row in ends]
    seeds, rows = zip(*pairs, strict=True)
    assert len({tuple(drawn) for drawn in uniforms(seeds, rows, [3] * len(pairs), 8).tolist()}) == len(pairs)
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        results = [package.generate(model, PROMPTS, 12, seed=seed, first_row=2**32 - 1) for seed in ends]
        assert len({str(rows) for rows in results}) == len(ends)


EXTREMES = [
    *({"temperature": t} for t in (5e-324, 1e-310, 1e-40, 1e-30, 1e-4, 1e30, 1e300)),
    *({"top_p": p} for p in (5e-324, 1e-40, 1 - 1e-12, 1.0)),
    *({"min_p": p} for p in (0.0, 1e-300, 1.0)),
    *({"repetition_penalty": p} for p in (1e-3, 1.0, 1e3)),
    *({"top_k": k} for k in (1, 96, 97)),
]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_extreme_values_choose_as_the_oracle_does(dtype):
    generator = np.random.default_rng(2)
    logits = (generator.normal(size=(64, 97)) * 30).astype(dtype)
    seen = generator.random((64, 97)) < 0.3
    u = generator.random(64).astype(np.float32)
    for options in EXTREMES:
        exact = {**options, "temperature": max(options.get("temperature", 1.0), 1e-300)}
        want = [
            oracle.choose(row, x, np.flatnonzero(s), **exact)
            for row, s, x in zip(logits, seen, u.astype(np.float64), strict=True)
        ]
        assert choose_by_both(logits, seen, u, [options] * 64) == [want, want], options


def test_top_p_of_one_keeps_every_token():
    """In float32 the more probable tokens may add up to 1 before the last ones."""
    logits = np.linspace(0, -30, 97, dtype=np.float32)[None].repeat(2, 0)
    for options in ({"top_p": 1.0}, {"top_p": 1.0, "top_k": 97, "min_p": 0.0}):
        rows, _ = row_options([check_options(options, 97), check_options({"top_p": 0.5}, 97)], 97)
        _, active = row_options([check_options({"top_p": 0.5, "top_k": 3, "min_p": 0.1}, 97)], 97)
        for package, array in ((gpt_torch, torch.from_numpy), (gpt_jax, jnp.asarray)):
            by_row = RowOptions(*map(array, rows))
            probs = np.asarray(package.sampling.filtered_probs(array(logits), by_row, active))
            assert (probs > 0).sum(axis=-1).tolist() == [97, 3]


PER_PROMPT = [
    {"temperature": 0},
    {"seed": 11, "top_k": 7, "row": "request-5c0ffee"},
    {"temperature": 1.3, "top_p": 0.8, "max_new_tokens": 5},
    {"temperature": 0, "repetition_penalty": 1.5, "row": 2**64 - 1},
    {"min_p": 0.1, "eos_id": 8, "seed": 2**64 - 1},
    {"temperature": 0.6, "top_k": None, "stop": [[3, 4], [17], [60], [61]]},
    {},
]
RULES = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
MIXED = [[5], [1, 2, 3], [90, 0, 7, 7, 31, 2, 4], [8, 8], [44] * 9, [1, 2, 3], [2]]


def ended_by_oracle(prompt, new, options):
    """by_oracle() for one entry of per_prompt: until its end token, its stop sequences or its own max_new_tokens."""
    checked = check_options({name: value for name, value in options.items() if value is not None}, TINY.n_vocab)
    rules = {name: options[name] for name in RULES if options.get(name) is not None}
    new = options.get("max_new_tokens", new)
    row = by_oracle(prompt, checked["row"], new, rules, checked["seed"])
    ends = checked["stop"] + ([] if checked["eos_id"] is None else [[checked["eos_id"]]])
    for end in range(len(prompt) + 1, len(row)):
        if any(row[max(len(prompt), end - len(sequence)) : end] == sequence for sequence in ends):
            return row[:end]
    return row


@pytest.mark.parametrize("dtype", [pytest.param(np.float32, marks=pytest.mark.slow), np.float64])
def test_options_per_prompt_give_what_each_prompt_gives_alone(dtype):
    """Greedy and sampled prompts in one batch, within the context and beyond it."""
    weights = probing_weights(TINY, dtype)
    with jax.enable_x64(dtype == np.float64):
        results = []
        for package in (gpt_torch, gpt_jax):
            model = package.adapter.build(TINY, weights)
            if package is gpt_jax:
                model = gpt_jax.for_decoding(model)
            shared = {"seed": 3, "top_k": 60}
            rows = package.generate(model, MIXED, 30, per_prompt=PER_PROMPT, **shared)
            for number, (prompt, own, row) in enumerate(zip(MIXED, PER_PROMPT, rows, strict=True)):
                at = {"row": number} | own
                assert row == ended_by_oracle(prompt, 30, shared | at)
                if package is gpt_jax and number != 5:
                    continue  # each set of rules is a program of its own, and the oracle has no batches
                assert [row] == package.generate(model, [prompt], 30, per_prompt=[at], **shared)
                if not isinstance(at["row"], str) and at["row"] < 2**32:
                    alone = {**shared, **own}
                    new = alone.pop("max_new_tokens", 30)
                    first_row = alone.pop("row", number)
                    assert [row] == package.generate(model, [prompt], new, first_row=first_row, **alone)
            backwards = package.generate(model, MIXED[::-1], 30, per_prompt=PER_PROMPT[::-1], **shared)
            assert [rows[i] for i in (1, 3)] == [backwards[::-1][i] for i in (1, 3)]  # they have rows of their own
            steps = list(package.stream(model, MIXED, 30, per_prompt=PER_PROMPT, **shared))
            streamed = [[t for t in tokens if t is not None] for tokens in zip(*steps, strict=True)]
            assert [prompt + new for prompt, new in zip(MIXED, streamed, strict=True)] == rows
            results.append(rows)
    assert results[0] == results[1]
    lengths = [len(row) - len(prompt) for prompt, row in zip(MIXED, results[0], strict=True)]
    assert lengths[2] == 5
    assert max(lengths) == 30


def test_samples_of_a_prompt_with_a_row_of_its_own():
    own = [{"row": 5}, {"row": "a"}]
    for package, model in zip((gpt_torch, gpt_jax), models(), strict=True):
        rows = package.generate(model, PROMPTS[:2], 8, samples=3, per_prompt=own)
        assert rows[:3] == package.generate(model, PROMPTS[:1], 8, samples=3, first_row=5)
        assert rows[3:] == package.generate(model, PROMPTS[1:2], 8, samples=3, per_prompt=own[1:])
        assert len({tuple(row) for row in rows}) == 6


def test_other_values_compile_nothing():
    model = gpt_jax.for_decoding(models()[1])
    everything = {"top_k": 9, "top_p": 0.9, "min_p": 0.01, "repetition_penalty": 1.2, "eos_id": 5, "stop": [[1, 2]]}
    gpt_jax.generate(model, PROMPTS, 9, **everything)
    before = _start._cache_size(), _cached_loop._cache_size()
    changed = {"top_k": 3, "top_p": 0.5, "min_p": 0.2, "repetition_penalty": 2.0, "eos_id": 7, "stop": [[3, 4]]}
    gpt_jax.generate(model, PROMPTS, 11, seed=2, temperature=0.3, **changed)
    gpt_jax.generate(model, PROMPTS, 9, per_prompt=[{}, {"temperature": 0, "top_k": None}, {"seed": 9}], **everything)
    own = [everything, changed, {"temperature": 0}]
    gpt_jax.generate(model, PROMPTS, 9, per_prompt=own)
    assert (_start._cache_size(), _cached_loop._cache_size()) == before
    many = PROMPTS * 5  # a number of rows that no other test has
    gpt_jax.generate(model, many, 9)
    before = _start._cache_size(), _cached_loop._cache_size()
    gpt_jax.generate(model, many, 9, temperature=0)
    assert (_start._cache_size(), _cached_loop._cache_size()) != before  # greedy batches have a program of their own


def test_each_form_of_a_call_honours_or_refuses_its_options():
    for package, model, array in zip(
        (gpt_torch, gpt_jax), models(), (torch.tensor(PROMPTS[1:2] * 2), jnp.asarray(PROMPTS[1:2] * 2)), strict=True
    ):
        lists = PROMPTS[1:2] * 2
        sampled = package.generate(model, lists, 6, samples=2, temperature=1.0)
        assert package.generate(model, array, 6, samples=2, temperature=1.0).tolist() == sampled
        assert package.generate(model, np.array(lists), 6, samples=2) == sampled
        steps = list(package.stream(model, array, 6))
        assert [p + list(new) for p, new in zip(lists, zip(*steps, strict=True), strict=True)] == package.generate(
            model, array, 6
        ).tolist()
        own = [{"max_new_tokens": 2}, {}]
        padded = package.generate(model, array, 6, eos_id=96, per_prompt=own).tolist()
        assert padded[0][:5] + [96] * 4 == padded[0]
        for options, message in (
            ({"return_logprobs": True}, "return_logprobs needs prompts as lists"),
            ({"stop": [[1]]}, "give eos_id"),
            ({"per_prompt": own}, "give eos_id"),
        ):
            with pytest.raises(InputError, match=message):
                package.generate(model, array, 6, **options)
        with pytest.raises(InputError, match="exactly one of prompts and idx"):
            package.generate(model, array, 6, idx=array)
        with pytest.raises(InputError, match="exactly one of prompts and idx"):
            package.generate(model)
        with pytest.raises(InputError, match="temperature: given both"):
            package.generate(model, array, 6, None, 1.0, temperature=1.0)
        with pytest.raises(InputError, match="by position"):
            package.generate(model, array, 6, None, 1.0, None, 3, 4)
        with pytest.raises(InputError, match="unknown option temprature; the options are context_size, eos_id"):
            package.stream(model, lists, 6, temprature=1.0)
        with pytest.raises(InputError, match="every"):
            package.stream(model, PROMPTS, every=0)


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([], {}, "at least one"),
        ([[]], {}, "end-of-text"),
        ([[1], [97]], {}, "token id 97"),
        ([[-1]], {}, "token id -1"),
        ([[1]], {"max_new_tokens": 0}, "max_new_tokens"),
        ([[1] * 30], {"context_size": 25}, "context_size"),
        ([[1] * 30], {"context_size": 0}, "context_size"),
        ([[1] * 30 + [97]], {"context_size": 9}, "token id 97"),
        ([[1]], {"overflow": "wrap"}, "overflow"),
        ([[1]], {"samples": 0}, "samples"),
        ([[1]], {"stop": [[]]}, "stop"),
        ([[1]], {"stop": [[97]]}, "stop"),
        ([[1]], {"stop": 5}, "stop must be a list of sequences of token ids, got 5"),
        ([[1]], {"per_prompt": 5}, "per_prompt must be a list of 1 dicts, one per prompt, got 5"),
        ([[1]], {"per_prompt": [3]}, r"per_prompt\[0\]: a dict of options is needed, got 3"),
        ([[1]], {"min_p": 1.5}, "min_p"),
        ([[1]], {"repetition_penalty": 0.0}, "repetition_penalty"),
        ([[1]], {"repetition_penalty": float("nan")}, "repetition_penalty"),
        ([[1]], {"first_row": -1}, "first_row"),
        ([[1] * 25], {"max_new_tokens": 1}, "more than the model's context"),
        ([[1]], {"temperature": -0.1}, "temperature"),
        ([[1]], {"temperature": float("nan")}, "temperature"),
        ([[1]], {"top_k": 0}, "top_k"),
        ([[1]], {"top_k": 98}, "top_k"),
        ([[1]], {"top_p": 0.0}, "top_p"),
        ([[1]], {"top_p": 1.1}, "top_p"),
        ([[1]], {"eos_id": 97}, "eos_id"),
        ([[1]], {"seed": -1}, "seed"),
        ([[1]], {"seed": 2**64}, "seed"),
        ([[1]], {"seed": 1.5}, "seed"),
        ([[1]], {"top_k": 2.0}, "top_k"),
        ([[1]], {"temperature": "hot"}, "temperature"),
        ([[1]], {"temperature": float("inf")}, "temperature"),
        ([[1]], {"repetition_penalty": 1e-40}, "repetition_penalty"),
        ([[1]], {"top_q": 0.5}, "unknown option top_q"),
        ([[1]], {"per_prompt": []}, r"per_prompt must be a list of 1 dicts, one per prompt, got \[\]"),
        ([[1], [2]], {"per_prompt": [{}, {"top_k": 98}]}, r"per_prompt\[1\]: top_k must be in 1..97"),
        ([[1]], {"per_prompt": [{"samples": 2}]}, r"per_prompt\[0\]: unknown option samples"),
        ([[1]], {"per_prompt": [{"row": -1}]}, r"per_prompt\[0\]: row must be"),
        ([[1]], {"per_prompt": [{"max_new_tokens": 0}]}, r"per_prompt\[0\]: max_new_tokens"),
        ("text", {}, "sequences of token ids"),
        ([1, 2], {}, "sequences of token ids"),
        ([[1.5]], {}, "sequences of token ids"),
        (np.zeros((1, 2)), {}, "sequences of token ids"),
    ],
)
def test_bad_requests(prompts, options, message):
    for package, model in ((gpt_torch, gpt_torch.GPTModel("tiny")), (gpt_jax, gpt_jax.GPTModel("tiny"))):
        with pytest.raises(InputError, match=message):
            package.generate(model, prompts, **{"max_new_tokens": 3, **options})
