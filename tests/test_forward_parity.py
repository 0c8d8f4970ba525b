"""Operations, a block and all logits of each backend agree with the NumPy oracle, and so with the other backend."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support import numpy_oracle as oracle
from support.models import TINY, probing_weights, random_batch
from support.tolerances import LOGITS_ATOL, logits_bound

import gpt_jax.adapter
import gpt_torch.adapter
from gpt_jax.model import GELU
from parity.comparison.compare import compare

pytestmark = pytest.mark.optimized  # as users' programs are compiled

OP_TOLERANCE = {np.float64: 1e-13, np.float32: 4e-6}  # of the largest element: 32 roundings and more
DTYPES = pytest.mark.parametrize("dtype", LOGITS_ATOL)


def check(name, got, want, atol):
    result = compare(name, got, want, atol)
    assert result.ok, str(result)
    return result


@DTYPES
def test_logits(backend, config, dtype):
    weights = probing_weights(config)
    tokens, _ = random_batch(config)
    got = backend.logits(config, {name: w.astype(dtype) for name, w in weights.items()}, tokens)
    assert got.dtype == dtype
    used = {name: w.astype(dtype).astype(np.float64) for name, w in weights.items()}
    print(check("logits", got, oracle.logits(config, used, tokens), logits_bound(config, used, tokens, dtype)))


def both(config, weights, x, run):
    """Return run(model, x) of torch and of JAX as NumPy arrays."""
    with torch.inference_mode():
        ours_torch = run(gpt_torch.adapter.build(config, weights), torch.from_numpy(x)).numpy()
    with jax.enable_x64(True):
        ours_jax = np.asarray(run(gpt_jax.adapter.build(config, weights), jnp.asarray(x)))
    return {"torch": ours_torch, "jax": ours_jax}


def first_block(model):
    if isinstance(model, gpt_jax.GPTModel):
        return jax.tree.map(lambda a: a[0], model.trf_blocks)
    return model.trf_blocks[0]


def oracle_norm2(w, x):
    return oracle.layer_norm(x, w["h.0.ln_2.weight"], w["h.0.ln_2.bias"])


def oracle_block(config, w, x):
    x = x + oracle.attention(config, w, "h.0.attn.", oracle.layer_norm(x, w["h.0.ln_1.weight"], w["h.0.ln_1.bias"]))
    return x + oracle.mlp(w, "h.0.mlp.", oracle_norm2(w, x))


# {op: (run in a block of ours, given the mask; the oracle's)}
OPS = {
    "LayerNorm": (lambda block, x, mask: block.norm2(x), lambda c, w, x: oracle_norm2(w, x)),
    "GELU": (lambda block, x, mask: block.ff.gelu(x), lambda c, w, x: oracle.gelu(x)),
    "FeedForward": (lambda block, x, mask: block.ff(x), lambda c, w, x: oracle.mlp(w, "h.0.mlp.", x)),
    "MultiHeadAttention": (
        lambda block, x, mask: block.att(x, mask),
        lambda c, w, x: oracle.attention(c, w, "h.0.attn.", x),
    ),
    "TransformerBlock": (lambda block, x, mask: block(x, mask), lambda c, w, x: oracle_block(c, w, x)),
}


@DTYPES
@pytest.mark.parametrize("op", OPS)
def test_ops(config, op, dtype):
    weights = {name: w.astype(dtype) for name, w in probing_weights(config).items()}
    x = np.random.default_rng(1).normal(size=(2, 9, config.n_embd)).astype(dtype)
    causal = np.tril(np.ones((9, 9), bool))
    run, reference = OPS[op]

    def one(model, x):
        mask = torch.from_numpy(causal) if isinstance(x, torch.Tensor) else jnp.asarray(causal)
        result = run(first_block(model), x, mask)
        return result[0] if isinstance(result, tuple) else result

    want = reference(config, {n: w.astype(np.float64) for n, w in weights.items()}, x.astype(np.float64))
    for name, got in both(config, weights, x, one).items():
        assert got.dtype == dtype
        check(f"{op} {name}", got, want, OP_TOLERANCE[dtype] * np.abs(want).max())


def test_torch_sdpa_equals_explicit(config):
    weights = probing_weights(config)
    tokens, targets = (torch.from_numpy(ids).long() for ids in random_batch(config))
    models = [gpt_torch.GPTModel(config, seed=None, attention=a).double() for a in ("explicit", "sdpa")]
    for model in models:
        gpt_torch.load_weights(model, weights)
        gpt_torch.loss.summed_loss(model, tokens, targets).backward()
    expected, got = (model(tokens).detach().numpy() for model in models)
    check("sdpa", got, expected, 1e-10)
    for (name, expected), got in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        check(name, got.grad.numpy(), expected.grad.numpy(), 1e-12 * expected.grad.abs().max().item())


def test_torch_sdpa_decodes_padded_rows_as_explicit():
    """A query in the padding of a shorter row attends to nothing; 30 tokens are more than the context has room for."""
    results = []
    for attention in ("explicit", "sdpa"):
        model = gpt_torch.GPTModel(TINY, seed=None, attention=attention).double()
        gpt_torch.load_weights(model, probing_weights(TINY))
        results.append(gpt_torch.generate(model, [[1], [2, 3, 4, 5, 6], [*range(20)]], 30, return_logprobs=True))
    (expected, expected_logprobs), (got, logprobs) = results
    assert got == expected
    check("log-probabilities", np.array(logprobs), np.array(expected_logprobs), 1e-10)


@pytest.mark.parametrize("unroll", [2, 3])
def test_unrolling_changes_nothing(config, unroll):
    tokens, _ = random_batch(config)
    a, b = (np.asarray(gpt_jax.GPTModel(config, unroll=u)(jnp.asarray(tokens))) for u in (1, unroll))
    check("unroll", a, b, 1e-6)


def test_same_seed_same_model_in_both():
    tokens, _ = random_batch(gpt_jax.GPTModel("tiny").config)
    got = np.asarray(gpt_jax.GPTModel("tiny", seed=5)(jnp.asarray(tokens)))
    with torch.inference_mode():
        want = gpt_torch.GPTModel("tiny", seed=5)(torch.from_numpy(tokens)).numpy()
        other = gpt_torch.GPTModel("tiny", seed=6)(torch.from_numpy(tokens)).numpy()
    check("logits", got, want, 1e-6)
    assert not compare("another seed", other, want, 1e-6).ok


def test_bfloat16_is_bfloat16_and_gives_float32_logits():
    from gpt_jax.model import GPTModel
    from gpt_jax.train import cast

    tokens, _ = random_batch(gpt_jax.GPTModel("tiny").config)
    exact = np.asarray(gpt_jax.GPTModel("tiny")(jnp.asarray(tokens)))
    short = cast(gpt_jax.GPTModel("tiny"), jnp.bfloat16)(jnp.asarray(tokens))
    with torch.inference_mode():
        torch_short = gpt_torch.GPTModel("tiny").bfloat16()(torch.from_numpy(tokens))
    assert short.dtype == jnp.float32
    assert torch_short.dtype == torch.float32
    program = str(jax.make_jaxpr(GPTModel.__call__)(cast(gpt_jax.GPTModel("tiny"), jnp.bfloat16), jnp.asarray(tokens)))
    products = [line for line in program.splitlines() if "= dot_general[" in line]
    assert len(products) >= 5  # q/k/v and out, scores and z, MLP in and out, in the scanned layer, and the head
    assert all(":bf16[" in line for line in products), products
    # 8 bits of mantissa, logits below 1; and not so near that float32 was computed instead.
    for got in (np.asarray(short), torch_short.numpy()):
        assert 1e-5 < compare("bfloat16", got, exact, 1.0).error < 0.02


def test_gelu_is_the_formula_of_the_paper():
    """The model multiplies in another order. Its error in float32 is that of a few roundings, in units of |x|.

    The argument of tanh is rounded five times, which moves tanh by at most 5 * 0.45 u, because y / cosh(y)**2 is below
    0.45; tanh itself is right to 5 u; of the sum 1 + tanh and the two products each is rounded once.
    """
    x = np.random.default_rng(0).normal(scale=3, size=100_000).astype(np.float32)
    x64 = x.astype(np.float64)
    expected = 0.5 * x64 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x64 + 0.044715 * x64**3)))
    bound = (0.5 * (5 * 0.45 + 5) + 3) * 2.0**-24 * np.abs(x64)
    check("JAX", np.asarray(jax.jit(GELU().__call__)(x)), expected, bound)
    check("torch", gpt_torch.model.GELU()(torch.from_numpy(x)).numpy(), expected, bound)
