"""Generation in JAX: prompt and whole loop in one compiled program, the rules of parity/sampling.py."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gpt_jax.model import GPTModel
from parity.sampling import prepare


def generate(
    model: GPTModel,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 50,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    seed: int = 0,
) -> list[list[int]]:
    """Continue each prompt; rows of token ids, prompt included, cut after `eos_id`.

    The same weights, options and seed give the same tokens as gpt_torch.generate. `temperature=0` is
    greedy. Raises InputError for empty prompts, ids and options out of range, and for more tokens
    than the context holds.
    """
    request = prepare(prompts, model.config, max_new_tokens, temperature, top_k, top_p, eos_id, seed)
    generated = _loop(
        model,
        request.tokens,
        request.first,
        request.uniforms,
        max_new_tokens,
        temperature,
        1.0 if top_p is None else top_p,
        -1 if eos_id is None else eos_id,
        greedy=temperature == 0,
        top_k=top_k,
        nucleus=top_p is not None,
    )
    return request.rows(np.asarray(generated))


@functools.partial(jax.jit, static_argnames=("greedy", "top_k", "nucleus"))
def _loop(model, tokens, first, uniforms, max_new_tokens, temperature, top_p, eos_id, *, greedy, top_k, nucleus):
    """Tokens [B, new]; stops early when every row has ended."""
    B, P = tokens.shape
    blocks = model.unstack()
    cache = model.new_cache(B, P + uniforms.shape[1])
    logits, cache = model.decode(tokens, cache, 0, first, blocks)

    def unfinished(carry):
        step, ended, *_ = carry
        return (step < max_new_tokens) & ~ended.all()

    def one_token(carry):
        step, ended, generated, logits, cache = carry
        token = choose(logits, uniforms[:, step], temperature, top_p, greedy, top_k, nucleus)  # [B]
        generated = generated.at[:, step].set(token)
        ended |= token == eos_id
        logits, cache = model.decode(token[:, None], cache, P + step, first, blocks)
        return step + 1, ended, generated, logits, cache

    start = (0, jnp.zeros(B, bool), jnp.zeros(uniforms.shape, jnp.int32), logits, cache)
    return jax.lax.while_loop(unfinished, one_token, start)[2]


def choose(logits: Array, u: Array, temperature, top_p, greedy: bool, top_k: int | None, nucleus: bool) -> Array:
    """logits [B, V], u [B] -> token ids [B], by the rules of parity/sampling.py."""
    if greedy:
        return logits.argmax(axis=-1).astype(jnp.int32)
    logits = logits / temperature
    if top_k is not None:
        smallest = jax.lax.top_k(logits, top_k)[0][:, -1:]
        logits = jnp.where(logits < smallest, -jnp.inf, logits)
    probs = jax.nn.softmax(logits, axis=-1)  # [B, V]
    if nucleus:
        ordered = jnp.sort(probs, axis=-1, descending=True)
        mass_before = ordered.cumsum(axis=-1) - ordered
        kept = (mass_before < top_p).sum(axis=-1, keepdims=True)  # at least 1: nothing is before the first
        probs = jnp.where(probs < jnp.take_along_axis(ordered, kept - 1, axis=-1), 0.0, probs)
    cdf = probs.cumsum(axis=-1)
    beyond = (cdf > u[:, None] * cdf[:, -1:]) & (probs > 0)
    last_kept = probs.shape[-1] - 1 - (probs > 0)[:, ::-1].argmax(axis=-1)
    return jnp.where(beyond.any(axis=-1), beyond.argmax(axis=-1), last_kept).astype(jnp.int32)
