"""Both backends as models of EleutherAI's lm-evaluation-harness (the extra `eval`); no other module imports lm_eval.

Tokens, truncation and stop strings follow the harness's own model of transformers ("hf"), so that the same weights get
the same results. A literal <|endoftext|> in a text is the end-of-text token. An empty context becomes that token.
Contexts are cut from the left. A generated text ends before its first stop string, however tokens divide it.
"""

import functools
import json
import logging
import multiprocessing
from collections import Counter
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook, TemplateLM
from lm_eval.api.registry import model_registry
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

import parity
from parity.data.tokenizer import END_OF_TEXT, Tokenizer
from parity.errors import InputError
from parity.evaluation.continuations import continue_texts
from parity.evaluation.scorer import Request, Scorer
from parity.weights import n_params
from parity.weights.digest import weights_sha256

MAX_GEN_TOKS = 256
"""Number of new tokens of a task that does not state one, as in the harness's other models."""
_GENERATED_TOGETHER = 16  # prompts, unless a batch size is given
_CACHE_OWNER = "gpt-parity model"  # key of a cache's entry that names the model whose answers it holds
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
_logger = logging.getLogger(__name__)


class HarnessModel(TemplateLM):
    """A model of either backend, which lm_eval.simple_evaluate accepts as `model`.

    Args:
        backend: The package gpt_torch or gpt_jax.
        model: A GPTModel of the backend.
        tokenizer: The model's tokenizer.
        batch_size: Number of requests that are computed together; it does not change the results. By default as many
            as the device computes efficiently.

    Raises:
        InputError: If the tokenizer has more tokens than the model.
    """

    def __init__(self, backend: Any, model: Any, tokenizer: Tokenizer, batch_size: int | None = None):
        super().__init__()
        if tokenizer.n_vocab > model.config.n_vocab:
            raise InputError(
                f"the {tokenizer.name} tokenizer has {tokenizer.n_vocab} tokens, but the model has only "
                f"{model.config.n_vocab}; they do not belong together"
            )
        # `backend` and `tokenizer` have other meanings in the harness.
        self.package, self.model, self.text_tokenizer = backend, model, tokenizer
        self.batch_size = batch_size
        self.scorer = Scorer(backend, model, batch_size=batch_size)

    @property
    def eot_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self.text_tokenizer.eos_id

    @property
    def max_length(self) -> int:
        """Length of the model's context."""
        return self.model.config.n_ctx

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, by which the harness distinguishes its caches of prompts."""
        return self.text_tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return the ids of a text. No token is ever added to them, whatever `add_special_tokens` says."""
        return self.text_tokenizer.encode(string, allowed_special="all")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Raise InputError for --apply_chat_template, because these models have no template."""
        if chat_template:
            raise InputError("--apply_chat_template: these models have no chat template; leave the option out")
        return ""

    def get_model_info(self) -> dict[str, Any]:
        """Return what the harness writes about the model into its results."""
        return {
            "model_num_parameters": n_params(self.model.config),
            "model_dtype": self._weights[1],
            "model_sha": self._weights[0],
            "model_revision": f"gpt-parity {parity.__version__}",
            "model_backend": self.package.__name__,
        }

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Use a cache, whose keys are the requests only; raises InputError if it has answers of another model."""
        if cache_hook.dbdict is not None:
            _claim(cache_hook.dbdict, f"{self.package.__name__}, {self.tokenizer_name}, {self._weights[0]}")
        super().set_cache_hook(cache_hook)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Score continuations of contexts.

        Args:
            requests: Their args are (context, continuation).
            disable_tqdm: Whether to show no progress.

        Returns:
            For each request the log-probability of the continuation in nats, and whether each of its tokens is the
            most likely one; the first id is, among equal logits.

        Raises:
            InputError: If a continuation has no tokens, or more than the model's context.
        """
        for context, continuation in (request.args for request in requests):
            _check_length(1 if continuation else 0, self.max_length, (context, continuation))
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            _check_length(len(continuation), self.max_length, texts)
            pairs.append(Request(context or [self.prefix_token_id], continuation))
        answers: list[Any] = [None] * len(requests)
        n_cut = 0
        with tqdm(total=len(requests), desc="Running loglikelihood requests", disable=disable_tqdm) as bar:
            for index, score in self.scorer.score(pairs):
                answers[index] = (score.logprob, score.is_greedy)
                n_cut += score.n_truncated > 0
                texts = requests[index][0]
                if texts is not None:  # the windows of loglikelihood_rolling() have no texts of their own
                    self.cache_hook.add_partial("loglikelihood", texts, answers[index])
                bar.update()
        if n_cut:
            _logger.warning(
                f"{n_cut} of {len(requests)} contexts were cut from the left, because they do not fit into the model's "
                f"context of {self.max_length} tokens together with their continuations"
            )
        return answers

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Score texts of any length.

        The end-of-text token precedes a text, and windows of the model's context divide it, so that each token is
        scored once; the last window has earlier tokens as context.

        Args:
            requests: Their args are (text,).
            disable_tqdm: Whether to show no progress.

        Returns:
            For each request the log-probability of the text in nats; 0 for an empty text.
        """
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            pairs = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, context_len=1)
            windows += [(None, *make_disjoint_window(pair)) for pair in pairs]
            owners += [number] * (len(windows) - len(owners))
        totals = [0.0] * len(requests)
        for number, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continue contexts until a stop string, the end of text, or a number of tokens.

        Args:
            requests: Their args are (context, generation_kwargs).
            disable_tqdm: Whether to show no progress.

        Returns:
            The new text of each request, without the stop string.

        Raises:
            InputError: For generation_kwargs that generate() does not have, and if max_gen_toks leaves no room for a
                context.
        """
        groups: dict[str, list[int]] = {}
        occurrences: Counter[str] = Counter()
        rows = []
        for number, (context, arguments) in enumerate(request.args for request in requests):
            groups.setdefault(json.dumps(arguments, sort_keys=True, default=str), []).append(number)
            rows.append(f"{occurrences[context]} {context}")  # random numbers: others each time, the same in any order
            occurrences[context] += 1
        texts = [""] * len(requests)
        size = self.batch_size or _GENERATED_TOGETHER
        with tqdm(total=len(requests), desc="Running generate_until requests", disable=disable_tqdm) as bar:
            for numbers in groups.values():
                until, max_new_tokens, options = self._generation_options(requests[numbers[0]].args[1])
                room = self.max_length - max_new_tokens
                prompts = {n: (self.tok_encode(requests[n].args[0]) or [self.prefix_token_id])[-room:] for n in numbers}
                numbers.sort(key=lambda n: -len(prompts[n]))
                for batch in (numbers[start : start + size] for start in range(0, len(numbers), size)):
                    new_texts = continue_texts(
                        self.package,
                        self._decoding_model,
                        self.text_tokenizer,
                        [prompts[n] for n in batch],
                        max_new_tokens,
                        until,
                        [rows[n] for n in batch],
                        options,
                    )
                    for number, text in zip(batch, new_texts, strict=True):
                        texts[number] = text
                        self.cache_hook.add_partial("generate_until", requests[number].args, text)
                        bar.update()
        return texts

    def _generation_options(self, generation_kwargs: dict[str, Any]) -> tuple[list[str], int, dict[str, Any]]:
        """Return the stop strings, the largest number of new tokens, and the options of generate()."""
        arguments: dict[str, Any] = {**normalize_gen_kwargs(generation_kwargs, MAX_GEN_TOKS)}
        until = handle_stop_sequences(arguments.pop("until"), eos=END_OF_TEXT)
        max_new_tokens, is_sampled = arguments.pop("max_gen_toks"), arguments.pop("do_sample")
        options = {"temperature": 0.0} | {name: arguments.pop(name) for name in _SAMPLING if name in arguments}
        if is_sampled and options["temperature"] == 0:
            raise InputError("generation_kwargs: do_sample=True needs a temperature above 0, such as temperature=1.0")
        if arguments.get("num_beams") == 1:
            del arguments["num_beams"]
        if arguments:
            raise InputError(
                f"generation_kwargs: {', '.join(sorted(arguments)):.80} is not supported; these models have until, "
                f"max_gen_toks, do_sample, {', '.join(_SAMPLING)}"
            )
        if not 1 <= max_new_tokens < self.max_length:
            raise InputError(
                f"generation_kwargs: max_gen_toks={max_new_tokens} must be at least 1 and leave room for a prompt in "
                f"the model's context of {self.max_length} tokens; pass --gen_kwargs max_gen_toks=N"
            )
        return until, max_new_tokens, options

    @functools.cached_property
    def _decoding_model(self) -> Any:
        """The model, arranged for decoding if the backend has such an arrangement."""
        return getattr(self.package, "for_decoding", lambda model: model)(self.model)

    @functools.cached_property
    def _weights(self) -> tuple[str, str]:
        """The sha256 and the dtype of the weights."""
        arrays = self.package.export_weights(self.model)
        return weights_sha256(self.model.config, arrays), str(next(iter(arrays.values())).dtype)


def _claim(cache: MutableMapping[str, Any], name: str) -> None:
    """Write the model's name into a new cache; raise InputError for a cache of another model."""
    owner = cache.get(_CACHE_OWNER, "unknown") if len(cache) else name
    if owner != name:
        raise InputError(
            f"--use_cache: {getattr(cache, 'filename', 'the cache')} has answers of another model ({owner}); this "
            f"one is {name}. Give each model a path of its own"
        )
    cache[_CACHE_OWNER] = name


def _check_length(n_tokens: int, n_ctx: int, texts: tuple[str, str] | None) -> None:
    """Raise InputError unless a continuation has 1 to n_ctx tokens."""
    context, continuation = texts or ("", "")
    name = f"the continuation {continuation!r:.80} of the context {context[-80:]!r}"
    if n_tokens == 0:
        raise InputError(f"{name} has no tokens of its own, so there is nothing to score; correct the document")
    if n_tokens > n_ctx:
        raise InputError(
            f"{name} has {n_tokens} tokens, more than the model's context of {n_ctx}; leave out its document "
            "(by --samples)"
        )


def run_command_line(models: Mapping[str, type[HarnessModel]]) -> None:
    """Run the harness's own command line, `lm-eval`, on `sys.argv`.

    Args:
        models: {name for --model: class}. A class is called with batch_size, max_batch_size and device, as the
            harness's options give them, and with the arguments of --model_args.
    """
    from lm_eval.__main__ import cli_evaluate  # here, because it imports what all tasks need

    # The harness computes standard errors in processes, and a fork of a process with JAX's threads may never end.
    can_serve = "forkserver" in multiprocessing.get_all_start_methods()
    multiprocessing.set_start_method("forkserver" if can_serve else "spawn", force=True)
    for name, cls in models.items():
        model_registry.register(name, target=cls)
    cli_evaluate()
