"""Generation in JAX: the whole loop one compiled program, the rules of parity/sampling.py."""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.decoding import Cache, DecodingModel, for_decoding
from gpt_jax.model import GPTModel
from parity.sampling import Request, Sampling, check_finite, prepare


def generate(
    model: GPTModel | DecodingModel,
    prompts: Sequence[Sequence[int]] | Array | None = None,
    max_new_tokens: int = 50,
    context_size: int | None = None,
    temperature: float | None = None,
    top_k: int | None = None,
    eos_id: int | None = None,
    *,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    stop: Sequence[Sequence[int]] = (),
    samples: int = 1,
    seed: int = 0,
    first_row: int = 0,
    overflow: Literal["crop", "stop"] = "crop",
    return_logprobs: bool = False,
    idx: Array | None = None,
) -> Any:
    """Continue each prompt; rows of token ids, prompt included, cut after `eos_id` or a `stop` sequence.

    The same weights, options and seed give the same tokens as gpt_torch.generate. `temperature=0` is
    greedy, 1.0 the default. `samples` rows for each prompt, next to each other. `return_logprobs`:
    (rows, for each row the log-probabilities in nats of its new tokens, from the logits as the model
    gives them). The other options: parity/sampling.py. Raises InputError for empty prompts, ids and
    options out of range, and logits that are not finite.

    As in the notebook, ids [B, T] in an array (or as `idx`) give ids [B, T + new], greedy by default;
    a row that met `eos_id` ends before it, and is filled up with it if others are longer.
    """
    ids = prompts if idx is None else idx
    if temperature is None:
        temperature = 0.0 if isinstance(ids, Array) else 1.0
    request = prepare(
        model.config,
        ids.tolist() if isinstance(ids, Array) else ids or [],
        max_new_tokens,
        context_size=context_size,
        overflow=overflow,
        eos_id=eos_id,
        stop=stop,
        samples=samples,
        seed=seed,
        first_row=first_row,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
    )
    for step, state in _run(model, request, request.max_new_tokens, return_logprobs):  # noqa: B007
        pass
    rows = request.rows(np.asarray(state.new_tokens), np.asarray(state.lengths))
    if isinstance(ids, Array):
        return jnp.asarray(request.rectangle(rows, eos_id), ids.dtype)
    if return_logprobs:
        lengths = np.asarray(state.lengths)
        return rows, [row[:n].tolist() for row, n in zip(np.asarray(state.logprobs), lengths, strict=True)]
    return rows


def generate_text_simple(model: GPTModel | DecodingModel, idx: Array, max_new_tokens: int, context_size: int) -> Array:
    """The notebook's greedy generation: ids [B, T] -> [B, T + max_new_tokens]."""
    return generate(model, idx, max_new_tokens, context_size)


def stream(
    model: GPTModel | DecodingModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    *,
    every: int = 1,
    **options: Any,
) -> Iterator[list[int | None]]:
    """The tokens of generate() with the same options as they come: a step's tokens, None for a row that ended.

    `every`: so many steps run in one call of the compiled loop, and come together.
    """
    request = prepare(model.config, prompts, max_new_tokens, **options)

    def steps() -> Iterator[list[int | None]]:
        shown = 0
        for step, state in _run(model, request, every):
            tokens, lengths = np.asarray(state.new_tokens), np.asarray(state.lengths)
            for i in range(shown, step):
                yield [int(row[i]) if length > i else None for row, length in zip(tokens, lengths, strict=True)]
            shown = step

    return steps()  # so that bad options are told of at once


class State(NamedTuple):
    """What the loop carries from token to token."""

    step: Array
    """int32, new tokens so far"""
    text: Array
    """int32 [B, P + new], the prompts at the right end of their bucket, then the new tokens"""
    lengths: Array
    """int32 [B], new tokens of each row"""
    ended: Array
    """bool [B]"""
    seen: Array | None
    """bool [B, V], the tokens of the row, where a penalty asks for them"""
    logprobs: Array
    """float32 [B, new]"""
    failed_at: Array
    """int32, the first step with logits that are not finite, or -1"""
    cache: Cache

    @property
    def new_tokens(self) -> Array:
        return self.text[:, self.text.shape[1] - self.logprobs.shape[1] :]

    @property
    def running(self) -> Array:
        return ~self.ended.all() & (self.failed_at < 0)


class Rules(NamedTuple):
    """The part of parity.sampling.Sampling that shapes the program; the numbers come with each call."""

    greedy: bool
    top_k: int | None
    top_p: bool
    min_p: bool
    repetition_penalty: bool
    logprobs: bool


def numbers_and_rules(sampling: Sampling, logprobs: bool = False) -> tuple[dict[str, float], Rules]:
    rules = Rules(
        sampling.temperature == 0,
        sampling.top_k,
        sampling.top_p is not None,
        sampling.min_p is not None,
        sampling.repetition_penalty is not None,
        logprobs,
    )
    # Python numbers: under jit they take the precision of the logits, as they do in torch.
    numbers = {name: float(value) for name, value in vars(sampling).items() if value is not None and name != "top_k"}
    return numbers, rules


def _run(
    model: GPTModel | DecodingModel, request: Request, every: int, logprobs: bool = False
) -> Iterator[tuple[int, State]]:
    """The state after the first token and then after each `every` steps, until every row has ended."""
    numbers, rules = numbers_and_rules(request.sampling, logprobs)
    decoder = for_decoding(model)
    arrays = (request.uniforms, request.first, request.limits, request.stops, request.stop_lengths)
    state = _start(decoder, request.tokens, arrays, numbers, cache_length=request.cache_length, rules=rules)
    cropped_loop = functools.partial(_cropped_loop, context_size=request.context_size)
    for end, loop in ((request.cached_tokens + 1, _cached_loop), (request.max_new_tokens, cropped_loop)):
        end = min(end, request.max_new_tokens)
        while True:
            step = int(state.step)
            check_finite(int(state.failed_at))
            if step >= end or not state.running:
                break
            yield step, state
            state = loop(decoder, state, arrays, numbers, np.int32(min(step + every, end)), rules=rules)
    yield min(step, request.max_new_tokens), state


@functools.partial(jax.jit, static_argnames=("cache_length", "rules"))
def _start(model, tokens, arrays, numbers, *, cache_length: int, rules: Rules) -> State:
    """The prompts read and the first token chosen."""
    uniforms, first, limits, *_ = arrays
    B, P = tokens.shape
    seen = None
    if rules.repetition_penalty:
        inside = jnp.arange(P) >= first[:, None]
        seen = jnp.zeros((B, model.config.n_vocab), bool).at[jnp.arange(B)[:, None], tokens].max(inside)
    state = State(
        step=jnp.int32(0),
        text=jnp.concatenate([tokens, jnp.zeros(uniforms.shape, jnp.int32)], axis=1),
        lengths=jnp.zeros(B, jnp.int32),
        ended=limits == 0,
        seen=seen,
        logprobs=jnp.zeros(uniforms.shape, jnp.float32),
        failed_at=jnp.int32(-1),
        cache=[],
    )
    logits, cache = model.decode(tokens, model.new_cache(B, cache_length), 0, first)
    return _add_token(state, logits, cache, arrays, numbers, rules)


@functools.partial(jax.jit, static_argnames="rules", donate_argnums=1)
def _cached_loop(model, state: State, arrays, numbers, until, *, rules: Rules) -> State:
    """Tokens up to step `until`, each one reading the cache."""

    def one_token(state: State) -> State:
        slot = state.text.shape[1] - state.logprobs.shape[1] + state.step - 1
        token = jax.lax.dynamic_slice_in_dim(state.text, slot, 1, axis=1)  # [B, 1]
        logits, cache = model.decode(token, state.cache, slot, arrays[1])
        return _add_token(state, logits, cache, arrays, numbers, rules)

    return jax.lax.while_loop(lambda state: state.running & (state.step < until), one_token, state)


@functools.partial(jax.jit, static_argnames=("rules", "context_size"), donate_argnums=1)
def _cropped_loop(model, state: State, arrays, numbers, until, *, rules: Rules, context_size: int) -> State:
    """Tokens up to step `until`, each one computed from the last tokens anew, as in the notebook."""

    def one_token(state: State) -> State:
        cropped = state.text.shape[1] - state.logprobs.shape[1] + state.step - context_size
        window = jax.lax.dynamic_slice_in_dim(state.text, cropped, context_size, axis=1)
        empty = model.new_cache(window.shape[0], context_size)
        logits, _ = model.decode(window, empty, 0, jnp.maximum(arrays[1] - cropped, 0))
        return _add_token(state, logits, state.cache, arrays, numbers, rules)

    return jax.lax.while_loop(lambda state: state.running & (state.step < until), one_token, state)


def _add_token(state: State, logits: Array, cache: Cache, arrays, numbers, rules: Rules) -> State:
    """Choose a token for each row from logits [B, V], and note which rows it ends."""
    uniforms, _, limits, stops, stop_lengths = arrays
    step = state.step
    slot = state.text.shape[1] - state.logprobs.shape[1] + step
    finite = (jnp.isfinite(logits.max(axis=-1)) | state.ended).all()
    token = choose(logits, state.seen, uniforms[:, step], numbers, rules)  # [B]
    logprobs = state.logprobs
    if rules.logprobs:
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]
        logprobs = logprobs.at[:, step].set((chosen - jax.nn.logsumexp(logits, axis=-1)).astype(jnp.float32))
    text = state.text.at[:, slot].set(token)
    lengths = state.lengths + ~state.ended
    tail = jax.lax.dynamic_slice_in_dim(text, slot + 1 - stops.shape[1], stops.shape[1], axis=1)
    matches = ((tail[:, None] == stops) | (stops < 0)).all(axis=-1) & (stop_lengths <= step + 1)  # [B, stops]
    return State(
        step=step + 1,
        text=text,
        lengths=lengths,
        ended=state.ended | (lengths >= limits) | matches.any(axis=-1),
        seen=None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True),
        logprobs=logprobs,
        failed_at=jnp.where(finite, state.failed_at, step),
        cache=cache,
    )


def choose(logits: Array, seen: Array | None, u: Array, numbers: dict[str, Any], rules: Rules) -> Array:
    """logits [B, V], seen bool [B, V], u [B] -> token ids [B], by the rules of parity/sampling.py."""
    logits = penalised(logits, seen, numbers, rules)
    if rules.greedy:
        return logits.argmax(axis=-1).astype(jnp.int32)
    probs = kept(logits, numbers, rules)
    cdf = probs.cumsum(axis=-1)
    beyond = (cdf > u[:, None] * cdf[:, -1:]) & (probs > 0)
    last_kept = probs.shape[-1] - 1 - (probs > 0)[:, ::-1].argmax(axis=-1)
    return jnp.where(beyond.any(axis=-1), beyond.argmax(axis=-1), last_kept).astype(jnp.int32)


def penalised(logits: Array, seen: Array | None, numbers: dict[str, Any], rules: Rules) -> Array:
    if seen is None or not rules.repetition_penalty:
        return logits
    penalty = numbers["repetition_penalty"]
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)


def kept(logits: Array, numbers: dict[str, Any], rules: Rules) -> Array:
    """Probabilities [B, V] before the filters, zero for tokens that a filter dropped."""
    logits = logits / numbers["temperature"]
    if rules.top_k is not None:
        k = rules.top_k
        logits = jnp.where(_largest(logits, lambda above: above.sum(axis=-1) < k), logits, -jnp.inf)
    probs = jax.nn.softmax(logits, axis=-1)  # [B, V]
    largest = probs.max(axis=-1, keepdims=True)
    if rules.top_p:

        def within(above: Array, probs: Array = probs) -> Array:
            return jnp.where(above, probs, 0).sum(axis=-1) < numbers["top_p"]

        probs = jnp.where(_largest(probs, within), probs, 0.0)
    if rules.min_p:
        probs = jnp.where(probs < numbers["min_p"] * largest, 0.0, probs)
    return probs


def _largest(values: Array, few_enough: Callable[[Array], Array]) -> Array:
    """Which values [B, V] to keep: those for which the set of strictly larger ones is `few_enough`.

    Bisection over the floats in order of their bits; on a CPU twenty times faster than XLA's sort or top_k.
    """
    bits = jax.lax.bitcast_convert_type(values, f"int{8 * values.dtype.itemsize}")
    ordered = jnp.where(bits < 0, bits ^ jnp.iinfo(bits.dtype).max, bits)  # integers in the floats' order

    def halve(ends):
        low, high = ends
        middle = (low & high) + ((low ^ high) >> 1)
        enough = few_enough(ordered > middle[:, None])
        return jnp.where(enough, low, middle + 1), jnp.where(enough, middle, high)

    start = ordered.min(axis=-1), ordered.max(axis=-1)
    return ordered >= jax.lax.while_loop(lambda ends: (ends[0] < ends[1]).any(), halve, start)[1][:, None]
