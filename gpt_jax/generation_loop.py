"""The loop of generation in JAX: it runs in compiled programs, and its state stays on the device.

The first program reads the prompts and chooses the first token. The second contains the loop over further tokens, for
as long as the key/value cache has room. The third contains the loop after that, which recomputes the context for each
token.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.arrays import shifted_logsumexp
from gpt_jax.decoding import Cache, DecodingModel, for_decoding
from gpt_jax.model import GPTModel, LayerCache
from gpt_jax.sampling import choose
from parity.generation import Chunk, Request, RowInputs, check_finite
from parity.sampling import ActiveRules, seen_tokens

SMALLEST_GROWTH = 128
"""Smallest number of slots by which a cache grows."""
SMALL_CACHE = 2**24
"""A cache of at most this many bytes is read so quickly that shortening it gains nothing."""


class State(NamedTuple):
    """The state that the loop carries from token to token."""

    step: Array
    """int32, number of new tokens of this segment"""
    text: Array
    """int32 [B, P + new], the right-aligned prompts (or the tokens of the previous segment), then the new tokens"""
    lengths: Array
    """int32 [B], number of new tokens of each row, in all segments"""
    ended: Array
    """bool [B]"""
    seen: Array | None
    """bool [B, V], the tokens of the row, if a repetition penalty needs them"""
    logprobs: Array
    """float32 [B, new]"""
    failed_at: Array
    """int32, the first step of this segment whose logits were not finite, or -1"""
    cache: Cache
    top_ids: Array | None = None
    """int32 [B, new, n_top], if they were requested"""
    top_logprobs: Array | None = None
    """float32 [B, new, n_top]"""

    @property
    def prompt_width(self) -> int:
        return self.text.shape[1] - self.logprobs.shape[1]

    @property
    def new_tokens(self) -> Array:
        return self.text[:, self.prompt_width :]

    @property
    def slot(self) -> Array:
        """The slot of the next token in `text` and in the cache."""
        return self.prompt_width + self.step

    @property
    def running(self) -> Array:
        return ~self.ended.all() & (self.failed_at < 0)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["leaves"], meta_fields=["structure"])
@dataclasses.dataclass(frozen=True)
class FlatModel:
    """The arrays of a DecodingModel. Each call flattens its arguments, which takes 0.3 ms for 12 layers of modules."""

    leaves: list[Array]
    structure: Any

    @classmethod
    def of(cls, decoder: DecodingModel) -> "FlatModel":
        return cls(*jax.tree.flatten(decoder))

    def unflatten(self) -> DecodingModel:
        return jax.tree.unflatten(self.structure, self.leaves)


class StaticOptions(NamedTuple):
    """The options that shape the compiled program; the values of all others are among its inputs."""

    active: ActiveRules
    return_logprobs: bool
    n_top: int = 0


def run(model: GPTModel | DecodingModel, request: Request, steps_per_call: int) -> Iterator[Chunk]:
    """Yield the first token, then those of each call of a compiled loop, until every row has ended."""
    decoder = for_decoding(model)
    inputs = request.inputs
    static = StaticOptions(request.active, request.return_logprobs, request.n_top)
    B, P = request.tokens.shape
    growth = cache_growth(decoder, B)
    cache_length = min(request.cache_length, P // growth * growth + growth)
    weights = FlatModel.of(decoder)
    seen = seen_tokens(request.prompts, decoder.config.n_vocab) if static.active.repetition_penalty else None
    state = _start(weights, request.tokens, seen, inputs, cache_length=cache_length, static=static)
    last_cached = request.n_cached_steps + 1
    first, done = 0, 0  # numbers of new tokens: before this segment, and in it
    while True:
        # One transfer of all that the host needs; copies, because the buffers are donated to the next call.
        host: Any = jax.tree.map(np.array, jax.device_get(state._replace(seen=None, cache=[])))
        if host.failed_at >= 0:
            check_finite(first + int(host.failed_at))
        columns = slice(done, min(int(host.step), request.max_new_tokens - first))
        done = int(host.step)
        top = [None if array is None else array[:, columns] for array in (host.top_ids, host.top_logprobs)]
        yield Chunk(host.new_tokens[:, columns], host.logprobs[:, columns], host.lengths, *top)
        if first + done >= request.max_new_tokens or not host.running:
            return
        if done == request.segment:
            state = _next_segment(state)
            first, done = first + done, 0
            inputs = inputs._replace(
                uniforms=request.uniforms(first), pad_lengths=np.zeros_like(request.inputs.pad_lengths)
            )
        end = min(request.segment, request.max_new_tokens - first)
        if first + done < last_cached:
            if P + done > cache_length:
                cache_length = min(request.cache_length, cache_length + growth)
                for number, layer_cache in enumerate(state.cache):  # so that two layers' caches exist twice at most
                    state.cache[number] = _lengthened(layer_cache, length=cache_length)
            until = np.int32(min(done + steps_per_call, last_cached, end, cache_length - P + 1))
            state = _cached_loop(weights, state, inputs, until, static=static)
        else:
            until = np.int32(min(done + steps_per_call, end))
            state = _cropped_loop(weights, state, inputs, until, static=static, context_size=request.context_size)


def cache_growth(decoder: DecodingModel, batch_size: int) -> int:
    """Return the number of slots by which the cache of `batch_size` rows grows when it is full.

    Each token reads all weights and the whole cache. The keys and values of this number of slots have about as many
    bytes as the weights, so that empty slots at most double what a token reads. It is not smaller, because each length
    of the cache has a compiled program of its own.
    """
    leaves = jax.tree.leaves(decoder)
    itemsize = leaves[0].dtype.itemsize
    weight_bytes = sum(leaf.size for leaf in leaves) * itemsize
    slot_bytes = 2 * decoder.config.n_layer * batch_size * decoder.config.n_embd * itemsize
    n_slots = max(weight_bytes, SMALL_CACHE) // slot_bytes
    return max(SMALLEST_GROWTH, 1 << max(0, n_slots.bit_length() - 1))


@functools.partial(jax.jit, static_argnames="length")
def _lengthened(layer_cache: LayerCache, *, length: int) -> LayerCache:
    return jax.tree.map(lambda x: jnp.pad(x, ((0, 0), (0, length - x.shape[1]), (0, 0))), layer_cache)  # [G, S, H]


@functools.partial(jax.jit, static_argnames=("cache_length", "static"))
def _start(
    weights: FlatModel,
    tokens: Array,
    seen: Array | None,
    inputs: RowInputs,
    *,
    cache_length: int,
    static: StaticOptions,
) -> State:
    """Read the prompts and choose the first token."""
    decoder = weights.unflatten()
    B = len(tokens)
    state = State(
        step=jnp.int32(0),
        text=jnp.concatenate([tokens, jnp.zeros(inputs.uniforms.shape, jnp.int32)], axis=1),
        lengths=jnp.zeros(B, jnp.int32),
        ended=inputs.max_new_per_row == 0,
        seen=seen,
        logprobs=jnp.zeros(inputs.uniforms.shape, jnp.float32),
        failed_at=jnp.int32(-1),
        cache=[],
    )
    if static.n_top:
        shape = (*inputs.uniforms.shape, static.n_top)
        state = state._replace(top_ids=jnp.zeros(shape, jnp.int32), top_logprobs=jnp.zeros(shape, jnp.float32))
    logits, cache = decoder.decode(tokens, decoder.new_cache(B, cache_length), 0, inputs.pad_lengths)
    return _add_token(state, logits, cache, inputs, static)


@functools.partial(jax.jit, static_argnames="static", donate_argnums=1)
def _cached_loop(weights: FlatModel, state: State, inputs: RowInputs, until: Array, *, static: StaticOptions) -> State:
    """Generate up to step `until`, while the context has room."""
    decoder = weights.unflatten()

    def one_token(state: State) -> State:
        token = jax.lax.dynamic_slice_in_dim(state.text, state.slot - 1, 1, axis=1)  # [B, 1]
        logits, cache = decoder.decode(token, state.cache, state.slot - 1, inputs.pad_lengths)
        return _add_token(state, logits, cache, inputs, static)

    return jax.lax.while_loop(lambda state: state.running & (state.step < until), one_token, state)


@functools.partial(jax.jit, static_argnames=("static", "context_size"), donate_argnums=1)
def _cropped_loop(
    weights: FlatModel, state: State, inputs: RowInputs, until: Array, *, static: StaticOptions, context_size: int
) -> State:
    """Generate up to step `until`, recomputing the last `context_size` tokens for each token, as in the notebook."""
    decoder = weights.unflatten()

    def one_token(state: State) -> State:
        n_cropped = state.slot - context_size
        window = jax.lax.dynamic_slice_in_dim(state.text, n_cropped, context_size, axis=1)  # [B, context_size]
        pad_lengths = jnp.maximum(inputs.pad_lengths - n_cropped, 0)
        logits, _ = decoder.decode(window, decoder.new_cache(len(window), context_size), 0, pad_lengths)
        return _add_token(state, logits, state.cache, inputs, static)

    return jax.lax.while_loop(lambda state: state.running & (state.step < until), one_token, state)


@jax.jit
def _next_segment(state: State) -> State:
    """Make room for further tokens; the cache is full, so none of it is needed any more."""
    return state._replace(
        step=jnp.int32(0),
        text=jnp.concatenate([state.new_tokens, jnp.zeros_like(state.new_tokens)], axis=1),
        logprobs=jnp.zeros_like(state.logprobs),
        cache=[],
    )  # the next tokens overwrite top_ids and top_logprobs


def _add_token(state: State, logits: Array, cache: Cache, inputs: RowInputs, static: StaticOptions) -> State:
    """Choose a token for each row from logits [B, V], and note which rows it ends."""
    step = state.step
    finite = (jnp.isfinite(logits.max(axis=-1)) | state.ended).all()
    token = choose(logits, state.seen, inputs.uniforms[:, step], inputs.options, static.active)  # [B]
    logprobs, top_ids, top_logprobs = state.logprobs, state.top_ids, state.top_logprobs
    if static.return_logprobs:
        largest, log_total = shifted_logsumexp(logits)  # [B, 1]
        chosen = jnp.take_along_axis(logits, token[:, None], axis=-1) - largest - log_total  # [B, 1]
        logprobs = logprobs.at[:, step].set(chosen[:, 0].astype(jnp.float32))
        if top_ids is not None and top_logprobs is not None:
            top_logits, ids = jax.lax.top_k(logits, static.n_top)  # [B, n_top]
            top_ids = top_ids.at[:, step].set(ids.astype(jnp.int32))
            top_logprobs = top_logprobs.at[:, step].set((top_logits - largest - log_total).astype(jnp.float32))
    text = state.text.at[:, state.slot].set(token)
    lengths = state.lengths + (~state.ended).astype(jnp.int32)
    return State(
        step=step + 1,
        text=text,
        lengths=lengths,
        ended=state.ended | (lengths >= inputs.max_new_per_row) | _stopped(text, state.slot + 1, inputs, lengths),
        seen=None if state.seen is None else state.seen.at[jnp.arange(len(token)), token].set(True),
        logprobs=logprobs,
        failed_at=jnp.where(finite, state.failed_at, step),
        cache=cache,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


def _stopped(text: Array, end: Array, inputs: RowInputs, lengths: Array) -> Array:
    """bool [B], true where the last of a row's new tokens, before slot `end`, ends a stop sequence of the row."""
    width = inputs.stops.shape[2]
    tail = jax.lax.dynamic_slice_in_dim(text, end - width, width, axis=1)[:, None]  # [B, 1, W]
    matches = ((tail == inputs.stops) | (inputs.stops < 0)).all(axis=-1)  # [B, stops]
    return (matches & (inputs.stop_lengths <= lengths[:, None])).any(axis=-1)
