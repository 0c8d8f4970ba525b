"""OpenAI's chat completions: /v1/chat/completions, for models that were tuned on instructions."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from parity.data.tokenizer import Tokenizer
from parity.serving.engine import Engine
from parity.serving.logprobs import chat_logprobs
from parity.serving.options import COMMON, OptionError, check_names, integer, read_sampling, switch, top_count
from parity.serving.respond import (
    LONGEST_TOKEN,
    answers_errors,
    check_number,
    choose_engine,
    read_body,
    respond,
    sampled_row,
)
from parity.serving.rows import FinishReason
from parity.serving.text import Token
from parity.training.initial import weights_folder
from parity.training.runs import RunFolder
from parity.tuning.args import read_tuning
from parity.tuning.encoding import encode_prompt
from parity.tuning.records import Record, conversation
from parity.tuning.template import render

OPTIONS = (*COMMON, "messages", "logprobs", "top_logprobs", "max_completion_tokens")
_ROLES = {"developer": "system"}  # the newer name of the same role


class ChatStyle:
    """How chat completions are written, with log-probabilities if they were requested."""

    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"
    id_prefix = "chatcmpl"

    def __init__(self, tokenizer: Tokenizer, with_logprobs: bool):
        self._tokenizer = tokenizer
        self._with_logprobs = with_logprobs

    def opening(self, index: int) -> dict[str, Any] | None:
        delta = {"role": "assistant", "content": ""}
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def part(self, index: int, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> dict[str, Any]:
        delta = {"content": text} if text else {}
        return {"index": index, "delta": delta, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def whole(self, index: int, text: str, tokens: Sequence[Token], reason: FinishReason | None) -> dict[str, Any]:
        message = {"role": "assistant", "content": text, "refusal": None}
        return {"index": index, "message": message, "logprobs": self._logprobs(tokens), "finish_reason": reason}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return chat_logprobs(self._tokenizer, tokens) if self._with_logprobs else None


def served_template(weights: Path, adapter: Path | None) -> str | None:
    """Return the template of a model that is served.

    Args:
        weights: The folder that the weights were read from.
        adapter: What --adapter names. If it is of a run, that run has the template.
    """
    folders = [weights] if adapter is None else [weights_folder(adapter), weights]
    run = next(filter(None, map(_run_of, folders)), None)
    return None if run is None else chat_template(run)


def _run_of(weights: Path) -> Path | None:
    """Return the run folder of which a folder with weights is a checkpoint, or None if it is of no run."""
    run = RunFolder(weights.resolve().parent.parent)
    return run.path if weights.resolve().parent == run.checkpoints and run.config_file.exists() else None


def chat_template(run: Path) -> str | None:
    """Return the template of a run that was tuned on instructions, or on preferences among responses to them; of any
    other run None.
    """
    if "tune" not in RunFolder(run).config():
        return None
    tune = read_tuning(RunFolder(run)).tune
    return tune.template if tune.task in ("instruct", "prefer") else None


def chat_prompt(messages: Any, engine: Engine) -> list[int]:
    """Return the ids after which the model writes its response to a conversation.

    Args:
        messages: [{"role": "user", "content": "..."}, ...] in the form of the API, the last one from the user.
        engine: An engine whose model was tuned on instructions.

    Raises:
        InputError: For messages of another form, those after which the context has no room for a response, and a
            model that was not tuned on instructions.
    """
    if engine.template is None:
        raise OptionError(
            f"the model {engine.name} was not tuned on instructions, so it has no form for messages; use "
            "/v1/completions, or serve a run of scripts/finetune.py",
            "model",
        )
    if not isinstance(messages, list) or not messages:
        raise OptionError("messages must be a list of messages that is not empty", "messages")
    plain: list[dict[str, Any]] = []
    for number, message in enumerate(messages, 1):
        if not isinstance(message, dict):
            raise OptionError(f"message {number} must be an object with role and content", "messages")
        for name, value in message.items():
            if name not in ("role", "content") and (name not in ("refusal", "name") or value is not None):
                raise OptionError(f"message {number}: this server has no {name!r:.80} in messages", "messages")
        role, content = message.get("role"), _text(message.get("content"), number)
        plain.append({"role": _ROLES.get(role, role) if isinstance(role, str) else role, "content": content})
    if sum(len(message["content"]) for message in plain) > LONGEST_TOKEN * engine.config.n_ctx:
        raise OptionError("messages are longer than the model's context", "messages")
    if plain[-1]["role"] != "user":
        raise OptionError("the last message must be from the user", "messages")
    turns = conversation(Record({"messages": plain}, "messages"), needs_response=False)
    prompt = encode_prompt(render(turns, engine.template), engine.tokenizer, "messages")
    if len(prompt) >= engine.config.n_ctx:
        raise OptionError(
            f"messages have {len(prompt)} tokens, but the model's context has {engine.config.n_ctx}", "messages"
        )
    return prompt


def _text(content: Any, number: int) -> str:
    """Return the text of a message: a text, or a list of parts that are texts."""
    if isinstance(content, str):
        return content
    if isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str) for part in content
    ):
        return "".join(part["text"] for part in content)
    raise OptionError(f"message {number}: content must be a text, or a list of parts of type text", "messages")


def chat_completions(engines: Mapping[str, Engine]) -> Callable[[Request], Awaitable[Response]]:
    """Return the route."""

    @answers_errors
    async def route(request: Request) -> Response:
        body = await read_body(request)
        check_names(body, OPTIONS)
        engine = choose_engine(engines, body)
        sampling = read_sampling(body, engine.config.n_vocab, engine.tokenizer.eos_id)
        with_logprobs, n_top = switch(body, "logprobs"), top_count(body, "top_logprobs")
        if n_top and not with_logprobs:
            raise OptionError("top_logprobs needs logprobs", "top_logprobs")
        prompt = chat_prompt(body.get("messages"), engine)
        most = integer(body, "max_completion_tokens", 1, 2**31 - 1)
        if most is not None and sampling.max_tokens is not None:
            raise OptionError("give max_completion_tokens or max_tokens, not both", "max_tokens")
        if most is None:
            most = engine.config.n_ctx - len(prompt) if sampling.max_tokens is None else sampling.max_tokens
        if most == 0:
            raise OptionError("max_tokens must be at least 1", "max_tokens")
        check_number(1, sampling.n, engine)
        rows = [sampled_row(prompt, most, sampling, number) for number in range(sampling.n)]
        style = ChatStyle(engine.tokenizer, with_logprobs)
        return await respond(request, engine, style, rows, sampling, n_top or 0, len(prompt))

    return route
