"""Log-probabilities in the forms of the API, and those of a prompt."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from parity.data.tokenizer import Tokenizer
from parity.evaluation.scorer import Request, Scorer
from parity.serving.text import TextStream, Token

SCORED_AT_ONCE = 8
"""Number of prompts that the engine scores between two steps of decoding."""


class PromptToken(NamedTuple):
    """A token of a prompt."""

    id: int
    logprob: float | None
    """None for the first token, which follows nothing."""
    top: Sequence[tuple[int, float]]
    offset: int
    """Number of characters of the prompt before this token."""


def score_prompts(
    scorer: Scorer, tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], n_top: int
) -> list[list[PromptToken]]:
    """Return the tokens of prompts with their log-probabilities; this runs on the engine's thread."""
    numbers = [number for number, prompt in enumerate(prompts) if len(prompt) > 1]
    requests = [Request(prompts[number][:1], prompts[number][1:]) for number in numbers]
    scores = {numbers[index]: score for index, score in scorer.score(requests, top=n_top)} if requests else {}
    result = []
    for number, prompt in enumerate(prompts):
        offsets = prompt_offsets(tokenizer, prompt)
        tokens = [PromptToken(prompt[0], None, (), 0)]
        if number in scores:
            score = scores[number]
            rows = zip(prompt[1:], score.token_logprobs.tolist(), score.top_ids.tolist(), strict=True)
            tops = score.top_logprobs.tolist()
            tokens += [
                PromptToken(id, logprob, list(zip(ids, values, strict=True)), offset)
                for (id, logprob, ids), values, offset in zip(rows, tops, offsets[1:], strict=True)
            ]
        result.append(tokens)
    return result


def prompt_offsets(tokenizer: Tokenizer, prompt: Sequence[int]) -> list[int]:
    """Return the number of characters before each token of a prompt."""
    text = TextStream(tokenizer)
    for id in prompt:
        text.add(id, 0.0, ())
    text.end()
    return [token.offset for token in text.release(is_finished=True)[1]]


def token_text(tokenizer: Tokenizer, id: int) -> str:
    """Return the text of one token; of a part of a character its bytes, as in OpenAI's API: bytes:\\xe2\\x82."""
    if id >= tokenizer.n_vocab:
        return ""
    data = tokenizer.token_bytes(id)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def completion_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token | PromptToken], start: int) -> dict[str, Any]:
    """Return the `logprobs` of a completion.

    Args:
        tokenizer: The tokenizer.
        tokens: The tokens, with as many most likely tokens each as were requested.
        start: Number of characters of the completion's text before the text that the tokens' offsets count from.
    """
    return {
        "tokens": [token_text(tokenizer, token.id) for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [_top(tokenizer, token) for token in tokens],
        "text_offset": [start + token.offset for token in tokens],
    }


def _top(tokenizer: Tokenizer, token: Token | PromptToken) -> dict[str, float] | None:
    """{text: log-probability} of the most likely tokens and the token itself. Where two tokens have the same text, the
    more likely one counts."""
    if token.logprob is None:
        return None
    entries: dict[str, float] = {}
    for id, logprob in [*token.top, (token.id, token.logprob)]:
        entries.setdefault(token_text(tokenizer, id), logprob)
    return entries


def chat_logprobs(tokenizer: Tokenizer, tokens: Sequence[Token]) -> dict[str, Any]:
    """Return the `logprobs` of a chat completion."""

    def entry(id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(id) if id < tokenizer.n_vocab else b""
        return {"token": token_text(tokenizer, id), "logprob": logprob, "bytes": list(data)}

    content = [
        {**entry(token.id, token.logprob), "top_logprobs": [entry(id, logprob) for id, logprob in token.top]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}
