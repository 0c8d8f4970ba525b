"""OpenAI's completions: /v1/completions."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from parity.data.tokenizer import END_OF_TEXT, Tokenizer
from parity.evaluation.scorer import Scorer
from parity.serving.engine import Engine
from parity.serving.logprobs import SCORED_AT_ONCE, PromptToken, completion_logprobs, score_prompts
from parity.serving.options import COMMON, MOST_ROWS, OptionError, check_names, read_sampling, switch, top_count
from parity.serving.respond import (
    answers_errors,
    check_number,
    choose_engine,
    encode,
    head_of,
    read_body,
    respond,
    sampled_row,
    until_disconnect,
    usage,
)
from parity.serving.rows import FinishReason
from parity.serving.security import JsonResponse, error_response
from parity.serving.text import Token

DEFAULT_MAX_TOKENS = 16
_LONG_BODY = 2**14  # bytes; the prompts of longer bodies are encoded on a thread, while other requests are answered
OPTIONS = (*COMMON, "prompt", "logprobs", "echo")


class CompletionStyle:
    """How completions are written.

    Args:
        tokenizer: The tokenizer.
        n_top: Number of most likely tokens for each token; None for no log-probabilities.
        prompts: For each row the text before the completion; empty without `echo`.
        prompt_tokens: For each row the tokens of that text, with log-probabilities if there are any.
    """

    object_name = chunk_name = "text_completion"
    id_prefix = "cmpl"

    def __init__(
        self,
        tokenizer: Tokenizer,
        n_top: int | None,
        prompts: Sequence[str],
        prompt_tokens: Sequence[Sequence[PromptToken]],
    ):
        self._tokenizer = tokenizer
        self._n_top = n_top
        self._prompts = prompts
        self._prompt_tokens = prompt_tokens

    def opening(self, index: int) -> dict[str, Any] | None:
        return self._choice(index, self._prompts[index], self._prompt_tokens[index], None) if self._prompts else None

    def part(self, index: int, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> dict[str, Any]:
        return self._choice(index, text, tokens, reason, len(self._prompts[index]) if self._prompts else 0)

    def whole(self, index: int, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> dict[str, Any]:
        choice = self.part(index, text, tokens, reason)
        opening = self.opening(index)
        if opening is not None:
            choice["text"] = opening["text"] + choice["text"]
            if choice["logprobs"] is not None:
                choice["logprobs"] = {
                    name: values + choice["logprobs"][name] for name, values in opening["logprobs"].items()
                }
        return choice

    def _choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[Token | PromptToken],
        reason: FinishReason | None,
        start: int = 0,
    ) -> dict[str, Any]:
        logprobs = None if self._n_top is None else completion_logprobs(self._tokenizer, tokens, start)
        return {"text": text, "index": index, "logprobs": logprobs, "finish_reason": reason}


def completions(engines: Mapping[str, Engine]) -> Callable[[Request], Awaitable[Response]]:
    """Return the route."""

    def score(engine: Engine, prompts: Sequence[Sequence[int]], n_top: int) -> list[list[PromptToken]]:
        return score_prompts(Scorer(engine.backend, engine.model), engine.tokenizer, prompts, n_top)

    async def scored(engine: Engine, prompts: Sequence[Sequence[int]], n_top: int) -> list[list[PromptToken]]:
        tokens: list[list[PromptToken]] = []
        for first in range(0, len(prompts), SCORED_AT_ONCE):
            tokens += await engine.call(score, engine, prompts[first : first + SCORED_AT_ONCE], n_top)
        return tokens

    @answers_errors
    async def route(request: Request) -> Response:
        body = await read_body(request)
        check_names(body, OPTIONS)
        engine = choose_engine(engines, body)
        sampling = read_sampling(body, engine.config.n_vocab, engine.tokenizer.eos_id)
        n_top, echo = top_count(body, "logprobs"), switch(body, "echo")
        max_tokens = DEFAULT_MAX_TOKENS if sampling.max_tokens is None else sampling.max_tokens
        if max_tokens == 0 and not echo:
            raise OptionError("max_tokens must be at least 1, except with echo", "max_tokens")
        if max_tokens == 0 and sampling.stream:
            raise OptionError("max_tokens must be at least 1 with stream", "max_tokens")
        if len(await request.body()) <= _LONG_BODY:
            prompts = _read_prompts(body, engine)
        else:
            prompts = await asyncio.to_thread(_read_prompts, body, engine)
        check_number(len(prompts), sampling.n, engine)
        rows = [
            sampled_row(prompt, max_tokens, sampling, number)
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(sampling.n))
        ]
        for row in rows if max_tokens else []:
            engine.check(row)
        texts, prompt_tokens = [], []
        if echo:
            texts = [engine.tokenizer.decode(_known(prompt, engine.tokenizer)) for prompt in prompts]
            if n_top is not None:
                tokens = await until_disconnect(request, scored(engine, prompts, n_top))
                if tokens is None:
                    return error_response(400, "the client left")
                prompt_tokens = tokens
            else:
                prompt_tokens = [[] for _ in prompts]
        style = CompletionStyle(
            engine.tokenizer,
            n_top,
            [text for text in texts for _ in range(sampling.n)],
            [tokens for tokens in prompt_tokens for _ in range(sampling.n)],
        )
        n_prompt = sum(map(len, prompts))
        if max_tokens == 0:
            choices = [style.whole(index, "", [], "length") for index in range(len(rows))]
            head = head_of(style, engine, sampling)
            return JsonResponse(head | {"choices": choices, "usage": usage(n_prompt, 0)})
        return await respond(request, engine, style, rows, sampling, n_top or 0, n_prompt)

    return route


def _known(prompt: Sequence[int], tokenizer: Tokenizer) -> list[int]:
    """The ids that have a text; a model may have more tokens than its tokenizer."""
    return [id for id in prompt if id < tokenizer.n_vocab]


def _read_prompts(body: Mapping[str, Any], engine: Engine) -> list[Sequence[int]]:
    """Return the ids of each prompt: `prompt` is a text, a list of ids, or a list of either."""
    prompt = body.get("prompt")
    if prompt is None:
        prompt = END_OF_TEXT  # the API's default
    prompts = [prompt] if isinstance(prompt, str) or _is_ids(prompt) else prompt
    if not isinstance(prompts, list) or not prompts or len(prompts) > MOST_ROWS:
        raise OptionError(
            f"prompt must be a text, a list of token ids, or a list of 1 to {MOST_ROWS} of either", "prompt"
        )
    encoded: list[Sequence[int]] = []
    n_ctx, n_vocab = engine.config.n_ctx, engine.config.n_vocab
    for number, item in enumerate(prompts):
        name = "prompt" if prompts is not prompt else f"prompt {number}"
        if item == END_OF_TEXT:
            ids: Sequence[int] = [engine.tokenizer.eos_id]
        elif isinstance(item, str):
            ids = encode(engine.tokenizer, item, n_ctx, "prompt")
        elif _is_ids(item):
            ids = item
        else:
            raise OptionError(f"{name} must be a text or a list of token ids that is not empty", "prompt")
        if len(ids) > n_ctx:
            raise OptionError(f"{name} has {len(ids)} tokens, but the model's context has {n_ctx}", "prompt")
        if not all(0 <= id < n_vocab for id in ids):
            raise OptionError(f"{name}: each token id must be in 0..{n_vocab - 1}", "prompt")
        encoded.append(ids)
    return encoded


def _is_ids(value: Any) -> bool:
    """Whether a value is a list of integers that is not empty."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, int) and not isinstance(item, bool) for item in value)
    )
