"""Generation in PyTorch: a cached loop, the rules of parity/sampling.py."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gpt_torch.model import GPTModel
from parity.sampling import Request, prepare


@torch.inference_mode()
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

    The same weights, options and seed give the same tokens as gpt_jax.generate. `temperature=0` is
    greedy. Raises InputError for empty prompts, ids and options out of range, and for more tokens
    than the context holds.
    """
    request = prepare(prompts, model.config, max_new_tokens, temperature, top_k, top_p, eos_id, seed)
    was_training = model.training
    model.eval()  # dropout has no place here
    try:
        return request.rows(_loop(model, request).cpu().numpy())
    finally:
        model.train(was_training)


def _loop(model: GPTModel, request: Request) -> Tensor:
    """Tokens [B, new]; stops early when every row has ended."""
    device = model.tok_emb.weight.device
    tokens, first, uniforms = (
        torch.from_numpy(array).to(device) for array in (request.tokens, request.first, request.uniforms)
    )
    B, P = tokens.shape
    cache = model.new_cache(B, request.cache_length)
    logits = model.decode(tokens, cache, 0, first)
    generated = torch.zeros((B, request.max_new_tokens), dtype=torch.int64, device=device)
    ended = torch.zeros(B, dtype=torch.bool, device=device)
    for step in range(request.max_new_tokens):
        token = choose(logits, uniforms[:, step], request.temperature, request.top_k, request.top_p)  # [B]
        generated[:, step] = token
        if request.eos_id is not None:
            ended |= token == request.eos_id
            if ended.all():
                break
        if step + 1 < request.max_new_tokens:
            logits = model.decode(token[:, None], cache, P + step, first)
    return generated


def choose(logits: Tensor, u: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> Tensor:
    """logits [B, V], u [B] -> token ids [B], by the rules of parity/sampling.py."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits / temperature
    if top_k is not None:
        smallest = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    probs = logits.softmax(dim=-1)  # [B, V]
    if top_p is not None:
        ordered = probs.sort(dim=-1, descending=True).values
        mass_before = ordered.cumsum(dim=-1) - ordered
        kept = (mass_before < top_p).sum(dim=-1, keepdim=True)  # at least 1: nothing is before the first
        probs = probs.masked_fill(probs < ordered.gather(-1, kept - 1), 0.0)
    cdf = probs.cumsum(dim=-1)
    beyond = (cdf > u[:, None] * cdf[:, -1:]) & (probs > 0)
    last_kept = probs.shape[-1] - 1 - (probs > 0).flip(-1).int().argmax(dim=-1)
    return torch.where(beyond.any(dim=-1), beyond.int().argmax(dim=-1), last_kept)
