import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import gpt_jax
import gpt_torch
from parity.errors import InputError

BAD = [
    (np.array([[0, 97]]), "token id 97"),
    (np.array([[-1, 3]]), "token id -1"),
    (np.zeros((1, 25), int), "n_ctx=24"),
    (np.zeros((1, 0), int), "empty"),
    (np.zeros(5, int), r"\[B, T\]"),
]


@pytest.mark.parametrize(("tokens", "message"), BAD)
def test_on_entry(tokens, message):
    with pytest.raises(InputError, match=message):
        gpt_torch.GPTModel("tiny")(torch.from_numpy(tokens))
    with pytest.raises(InputError, match=message):
        gpt_jax.GPTModel("tiny")(jnp.asarray(tokens))


def test_under_jit():
    """Lengths are always checked; an id outside the vocabulary gives NaN under jit, never another token's logits."""
    model = gpt_jax.GPTModel("tiny")
    forward = jax.jit(gpt_jax.GPTModel.__call__)
    with pytest.raises(InputError, match="n_ctx=24"):
        forward(model, jnp.zeros((1, 25), int))
    assert jnp.isfinite(forward(model, jnp.array([[0, 96]]))).all()
    for token in (97, 2**31 - 1, -1, -97, -98, -(2**31)):
        assert jnp.isnan(forward(model, jnp.array([[0, token]]))[0, 1]).all()
