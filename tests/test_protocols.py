"""Protocols: which tokens of a file are scored, and what the scores mean. Each test shows a planted error too."""

import json
import math
import re
import zipfile

import numpy as np
import pytest

from parity.data.tokenizer import ByteTokenizer, load_tokenizer
from parity.errors import InputError
from parity.evaluation import core, corpus, detokenizers, lambada, stream
from parity.evaluation.catalog import PROTOCOLS, find
from parity.evaluation.data import Content
from parity.evaluation.estimates import estimate
from parity.evaluation.protocol import Task, fitted, joint, limited, others
from parity.evaluation.run import items_of
from parity.evaluation.scorer import Score

BYTES = ByteTokenizer()
EOS = BYTES.eos_id


@pytest.fixture(scope="module")
def gpt2(vocab_bpe):
    return load_tokenizer("gpt2", vocab_bpe)


def task(text, tokenizer=BYTES, n_ctx=1024, **options):
    data = text.encode() if isinstance(text, str) else "".join(json.dumps(line) + "\n" for line in text).encode()
    return Task(Content(data, "file", "0", False), tokenizer, n_ctx, **options)


def pairs(items, tokenizer=BYTES):
    """Return (context, continuation) of all requests as texts."""
    return [tuple(tokenizer.decode(ids) for ids in request) for item in items for request in item.requests]


def scored(*logprobs, greedy=True, top_ids=()):
    """Return the score of a request whose tokens have these log-probabilities."""
    values = np.array(logprobs, np.float32)
    return Score(
        float(values.sum(dtype=np.float64)), greedy, values, 0, 1.0, np.array(top_ids), np.zeros(np.shape(top_ids))
    )


def lambada_items(name, texts, **options):
    return items_of(PROTOCOLS[name], task([{"text": text} for text in texts], **options))


# LAMBADA


PASSAGE = 'He saw a light.\n\n"Come in," said the \n\nwizard'


def test_the_last_word_of_lambada(gpt2):
    """The same passage by each protocol: what is context, what is scored, and the end-of-text token."""
    expected = {
        "lambada-openai/last-word": ('He saw a light.\n\n"Come in," said the', " \n\nwizard"),
        "lambada-openai/last-word-strict": ('He saw a light.\n\n"Come in," said the', " wizard"),
        "lambada-core": ('<|endoftext|>He saw a light.\n\n"Come in," said the', " \n\nwizard"),
        "lambada-openai/stop-words": ('He saw a light.\n\n"Come in," said the', " \n\nwizard"),
    }
    for name, pair in expected.items():
        [(item, _)] = lambada_items(name, [PASSAGE], tokenizer=gpt2)
        assert pairs([item], gpt2) == [pair], name
        context, continuation = item.requests[0]
        assert list(context).count(gpt2.eos_id) == (name == "lambada-core"), name
        if name != "lambada-openai/last-word-strict":
            assert [*context, *continuation] == [gpt2.eos_id] * (name == "lambada-core") + gpt2.encode(PASSAGE)
    [(item, _)] = lambada_items("lambada-openai/last-token", [PASSAGE], tokenizer=gpt2)
    assert [list(ids) for ids in item.requests[0]] == [gpt2.encode(PASSAGE)[:-1], gpt2.encode(PASSAGE)[-1:]]


def test_joint_and_separate_encoding_differ(gpt2):
    """A continuation without a space merges with its context if they are one text; a trailing space moves over."""
    assert [list(ids) for ids in joint(gpt2, "the hou", "se")] == [gpt2.encode("the hou"), []]  # "house" is one token
    assert [list(ids) for ids in joint(gpt2, "the hou", "ses")] != [gpt2.encode("the hou"), gpt2.encode("ses")]
    assert pairs([core.Item((joint(gpt2, "a b  ", "c"),), {}, "")], gpt2) == [("a b", "  c")]
    assert joint(gpt2, "", " a") == ([gpt2.eos_id], gpt2.encode(" a"))
    assert joint(gpt2, " ", "a") == ([gpt2.eos_id], gpt2.encode(" a"))


def test_a_word_counts_if_all_its_tokens_are_the_most_likely():
    protocol = PROTOCOLS["lambada-openai/last-word"]
    [(item, _)] = lambada_items(protocol.name, ["a b"])
    results = protocol.judge(None, item, [scored(-1, -2)])
    assert (results["logprob"], results["correct"]) == (-3, True)
    assert not protocol.judge(None, item, [scored(-1, -2, greedy=False)])["correct"]


def test_stop_words_are_passed_over_at_the_first_token_only(gpt2):
    the, *oafs = gpt2.encode(" the oafs")
    assert gpt2.decode(oafs[-1:]) == "s"
    assert "s" in lambada._STOP_WORDS.split()
    [(item, _)] = lambada_items("lambada-openai/stop-words", ["he saw the oafs"], tokenizer=gpt2)
    assert list(item.requests[0].continuation) == oafs
    judge, given = PROTOCOLS["lambada-openai/stop-words"].judge, task("", gpt2)
    rest = [[id, the] for id in oafs[1:]]

    def is_right(top_ids, given=given):
        return judge(given, item, [scored(-1, -1, -1, top_ids=top_ids)])["correct"]

    assert is_right([[the, oafs[0]], *rest])
    assert is_right([[oafs[0], the], *rest])
    assert not is_right([[the, the], *rest])
    assert not is_right([[oafs[0], the], rest[0], [the, oafs[2]]])  # would be right if "s" were passed over here too
    assert not is_right([[the, oafs[0]], *rest], given._replace(stop_words=frozenset(["of"])))


def test_the_control_gives_each_item_another_context():
    for n in (2, 3, 10):
        assert sorted(others(n)) == list(range(n))
        assert all(other != index for index, other in enumerate(others(n)))
    [(a, _), (b, _)] = lambada_items("lambada-openai/last-word", ["one x", "two y"], control=True)
    assert pairs([a, b]) == [("two", " x"), ("one", " y")]
    with pytest.raises(InputError, match="at least two items"):
        others(1)


# HellaSwag


SWAG = {
    "activity_label": "Cutting bread",
    "ctx_a": "A woman [title] holds a knife.",
    "ctx_b": "she",
    "ctx": "A woman [title] holds a knife. she",
    "endings": ["cuts it [step] now.", "cuts wood.", "is bread.", "cuts."],
    "label": 1,
}


def test_the_texts_of_hellaswag():
    """As they are; with the activity, cleaned and capitalized; and with the end-of-text token and a common prefix."""
    expected = {
        "hellaswag/completion": ("A woman [title] holds a knife. she", [f" {ending}" for ending in SWAG["endings"]]),
        "hellaswag/lm-eval": (
            "Cutting bread: A woman. holds a knife. She",
            [" cuts it now.", " cuts wood.", " is bread.", " cuts."],
        ),
        "hellaswag/core": (
            "<|endoftext|>Cutting bread: A woman. holds a knife. She ",
            ["cuts it now.", "cuts wood.", "is bread.", "cuts."],
        ),
    }
    for name, (context, endings) in expected.items():
        [(item, _)] = items_of(PROTOCOLS[name], task([SWAG]))
        assert pairs([item]) == [(context, ending) for ending in endings], name
        assert item.facts["gold"] == 1


def test_separate_encoding_of_completions(gpt2):
    """A space at the end of the context stays there; encoded together, it would be scored."""
    line = {**SWAG, "ctx": "It ends with a space "}
    [(item, _)] = items_of(PROTOCOLS["hellaswag/completion"], task([line], gpt2))
    assert list(item.requests[1].context) == gpt2.encode("It ends with a space ")
    assert list(item.requests[1].continuation) == gpt2.encode(" cuts wood.")
    assert pairs([core.Item((joint(gpt2, line["ctx"], " cuts wood."),), {}, "")], gpt2)[0][1] == "  cuts wood."


def test_normalization_decides_between_endings():
    """Sums, means per token, per character and per byte choose different endings from the same scores."""
    line = {**SWAG, "endings": ["ab", "abcdefgh", "ééé", "z"], "label": 0}
    [(item, _)] = items_of(PROTOCOLS["hellaswag/lm-eval"], task([line]))
    scores = [scored(-2.0), scored(-4.0), scored(-1.9), scored(-1.0)]
    results = PROTOCOLS["hellaswag/lm-eval"].judge(None, item, scores)
    lengths = {"characters": [2, 8, 3, 1], "bytes": [2, 8, 6, 1]}
    assert (item.facts["n_characters"], item.facts["n_bytes"]) == tuple(lengths.values())
    assert results["choice"] == 3  # the largest sum
    assert results["choice_per_character"] == 1  # -0.5, against -0.63 of the third
    assert results["choice_per_byte"] == 2  # -0.32, against -0.5 of the second
    [(item, _)] = items_of(PROTOCOLS["hellaswag/completion"], task([line]))
    lengths = [len(request.continuation) for request in item.requests]
    assert lengths == [3, 9, 7, 2]
    means = (-1.0, -0.4, -0.9, -1.3)
    scores = [scored(*[mean] * length) for mean, length in zip(means, lengths, strict=True)]
    results = PROTOCOLS["hellaswag/completion"].judge(None, item, scores)
    assert results["choice"] == 3
    assert results["choice_per_token"] == 1


def test_the_first_of_equal_options_wins():
    [(item, _)] = items_of(PROTOCOLS["hellaswag/lm-eval"], task([{**SWAG, "endings": ["ab", "cd"], "label": 0}]))
    results = PROTOCOLS["hellaswag/lm-eval"].judge(None, item, [scored(-1.0), scored(-1.0)])
    assert results["choice"] == results["choice_per_character"] == 0
    [(item, _)] = items_of(PROTOCOLS["hellaswag/core"], task([{**SWAG, "endings": ["ab", "cd"], "label": 0}]))
    assert core.judge_choice(None, item, [scored(-1.0), scored(-1.0)])["choice"] == 0


# Streams of text


WIKI = (
    ' \n = One = \n \n He said " hi " , and 5 @.@ 3 ( about ) . \n \n = = Part = = \n \n'
    " It 's N . \n = Two = \n \n Last . \n"
)


def test_the_rows_of_wikitext_are_joined_as_published(gpt2):
    """Lines with text keep their end and are followed by a blank line; blank ones, which hold a space, are empty."""
    assert stream._joined(" \n a \n \n") == "\n\n a \n\n\n"
    items = [item for item, _ in items_of(PROTOCOLS["wikitext-2/hf-1024"], task(WIKI))]
    assert sum(item.facts["words"] for item in items) == pytest.approx(len(WIKI.split()) + 11, rel=1e-12)


@pytest.mark.parametrize(("name", "stride"), [("wikitext-2/hf-1024", 1024), ("wikitext-2/hf-512", 512)])
def test_windows_of_the_perplexity_page(name, stride):
    """Written after the page: windows begin at multiples of the stride, and score what the one before did not."""
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 2700)))
    given = task(text)
    items = [item for item, _ in items_of(PROTOCOLS[name], given)]
    ids = BYTES.encode(stream._joined(text))
    expected, previous = [], 0
    for begin in range(0, len(ids), stride):
        end = min(begin + 1024, len(ids))
        first = max(begin + 1, previous)  # the first label of a window is dropped
        expected.append((ids[begin:first], ids[first:end]))
        previous = end
        if end == len(ids):
            break
    assert [tuple(map(list, item.requests[0])) for item in items] == expected
    n_scored = sum(item.facts["tokens"] for item in items)
    assert n_scored == len(ids) - (len(expected) if stride == 1024 else 1)


def test_articles_of_wikitext():
    pages = list(stream.articles(WIKI))
    assert "\n".join(pages) == WIKI[2:]
    assert [page.lstrip().split("\n")[0].strip() for page in pages] == ["= One =", "= Two ="]
    items = [item for item, _ in items_of(PROTOCOLS["wikitext/lm-eval"], task(WIKI, n_ctx=32))]
    assert len(items) == 2
    for page, item in zip(pages, items, strict=True):
        ids = BYTES.encode(detokenizers.wikitext(page))
        assert [id for request in item.requests for id in request.continuation] == ids  # each token once
        assert list(item.requests[0].context) == [EOS]
        assert all(len(request.context) == 1 for request in item.requests[:-1])  # disjoint but for one token
        last = item.requests[-1]
        assert len(last.context) + len(last.continuation) == min(33, 1 + len(ids))  # filled up with earlier context
        assert item.facts["words"] == len(re.split(r"\s+", page))
        assert item.facts["bytes"] == len(page.encode())


def test_words_are_counted_as_each_protocol_counts_them():
    """Five counts of the same text; dividing by the wrong one changes the result by percents."""
    lines = WIKI.count("\n")
    counts = {
        "wikitext-2/hf-1024": len(WIKI.split()) + lines,
        "wikitext/lm-eval": sum(len(re.split(r"\s+", page)) for page in stream.articles(WIKI)),
        "wikitext-103/megatron": len(WIKI.strip().split(" ")) - 1,
    }
    for name, count in counts.items():
        items = items_of(PROTOCOLS[name], task(WIKI))
        assert sum(item.facts["words"] for item, _ in items) == pytest.approx(count, rel=1e-12), name
    assert len({len(WIKI.split()), *counts.values()}) == 4


def test_windows_of_megatron():
    """Each window scores 32 tokens after 992 of context, the first one 1,024; only the first token is left out."""
    text = "".join(map(chr, np.random.default_rng(0).integers(97, 123, 1100)))
    items = [item for item, _ in items_of(PROTOCOLS["wikitext-103/megatron"], task(text))]
    ids = BYTES.encode(text)
    assert [len(item.requests[0].continuation) for item in items] == [1024, 32, 32, 11]
    assert [id for item in items for id in item.requests[0].continuation] == ids[1:]
    assert list(items[1].requests[0].context) == ids[32:1025]


def test_detokenizers_keep_their_errors():
    assert detokenizers.wikitext('He said " hi " , and 5 @.@ 3 ( about ) . \n It \'s N .') == (
        'He said "hi", and 5.3 (about).\nIt\'s 1 .'
    )
    assert detokenizers.wikitext("of N of") == "of 1 of"
    assert detokenizers.wikitext("born in ' 90") == "born in ' 90"
    assert detokenizers.wikitext("born in /' 9/") == "born in /'[0-9]/"  # the rule for years, with its slashes
    assert detokenizers.wikitext(" = = = A = = = \n = B = ") == " === A ===\n= B = "
    assert detokenizers.ptb(" he said 's n't $ N of N years \n the end \n") == " he said'sn't $1 of1 years\nthe end\n"
    assert detokenizers.cbt("`` I do n't , '' he said .") == '"I don\'t," he said.'


def test_ptb_counts_ends_of_sentences():
    text = " no it was n't \n the <unk> rose N points \n"
    [(item, _)] = items_of(PROTOCOLS["ptb"], task(text))
    assert item.facts["words"] == 9 + 2
    assert pairs([item])[0][0] == "<|endoftext|>"


def test_enwik8_and_text8_are_their_last_bytes(monkeypatch):
    monkeypatch.setattr(stream, "_TEST_SIZE", 6)
    [(item, _)] = items_of(PROTOCOLS["enwik8"], task("abcédef"))
    assert item.facts["bytes"] == 6
    assert pairs([item]) == [("<|endoftext|>", "cédef")]
    monkeypatch.setattr(stream, "_TEST_SIZE", 4)
    [(item, _)] = items_of(PROTOCOLS["enwik8"], task("abcédef"))
    assert pairs([item]) == [("<|endoftext|>", "\ufffddef")]  # a character that was cut
    monkeypatch.setattr(stream, "_TEST_SIZE", 6)
    [(item, _)] = items_of(PROTOCOLS["text8"], task("the quick fox"))
    assert pairs([item]) == [("<|endoftext|>", "ck fox")]
    assert PROTOCOLS["text8"].metrics[0].unit == "bits per character"


def test_a_corpus_is_scored_once_in_bits_of_its_text(tmp_path):
    """End-of-text tokens between documents are predicted, but are no bytes of the text."""
    path = tmp_path / "docs.jsonl"
    path.write_text('{"text": "ab"}\n{"text": "cde"}\n')
    given = Task(None, BYTES, 4, corpus=str(path), split="all")
    items = [item for item, _ in items_of(PROTOCOLS["loss"], given)]
    assert [id for item in items for id in item.requests[0].continuation] == [*b"ab", EOS, *b"cde", EOS]
    assert sum(item.facts["tokens"] for item in items) == 7
    assert sum(item.facts["bytes"] for item in items) == 5
    judged = corpus._judge(given, items[0], [scored(-1, -2, -4, -8)])
    assert list(items[0].requests[0].continuation) == [*b"ab", EOS, *b"c"]
    assert judged == {"logprob": -15, "text_logprob": -11}
    validation = given._replace(split="validation")
    assert len(items_of(PROTOCOLS["loss"], validation)) < len(items)


# CBT


STORY = "".join(f"{n} Sentence {n} .\n" for n in range(1, 21))
QUESTION = "21 `` The XXXXX did n't bark , '' he said .\tdog\t\t" + "|".join(
    ["cat", "dog", *(f"w{n}" for n in range(8))]
)


def test_an_option_of_cbt_is_scored_with_the_rest_of_the_sentence():
    [(item, _)] = items_of(PROTOCOLS["cbt-cn"], task(STORY + QUESTION + "\n\n", n_ctx=2000))
    context, continuation = pairs([item])[1]
    assert context.startswith("Sentence 1. Sentence 2.")
    assert context.endswith('Sentence 20. "The')
    assert continuation == " dog didn't bark,\" he said."
    assert item.facts["gold"] == 1
    assert len(item.requests) == 10
    results = PROTOCOLS["cbt-cn"].judge(None, item, [scored(-5.0), scored(-4.0), *[scored(-6.0)] * 8])
    assert results["correct"]


def test_the_control_of_cbt_exchanges_passages():
    stories = STORY + QUESTION + "\n\n" + STORY.replace("Sentence", "Other") + QUESTION + "\n"
    for control, beginning in ((False, "Sentence 1."), (True, "Other 1.")):
        item = items_of(PROTOCOLS["cbt-ne"], task(stories, n_ctx=2000, control=control))[0][0]
        assert pairs([item])[0][0].startswith(beginning)


# CORE


def bundle(folder, tasks):
    """Write an invented bundle: {label: (kind, shots, delimiter, baseline in %, lines)}."""
    (folder / "eval_data").mkdir(parents=True)
    yaml = "icl_tasks:\n"
    table = "Eval Task,Task Category,Random baseline,Description\n"
    for label, (kind, shots, delimiter, baseline, lines) in tasks.items():
        yaml += f"-\n  label: {label}\n  dataset_uri: {label}.jsonl\n  num_fewshot: [{shots}]\n"
        yaml += f"  icl_task_type: {kind}\n"
        yaml += "" if delimiter is None else f"  continuation_delimiter: {json.dumps(delimiter)}\n"
        table += f'{label},world knowledge,{baseline},"a, b"\n'
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "core.yaml").write_text(yaml)
    (folder / "eval_meta_data.csv").write_text(table)
    return folder


CHOICES = [{"query": f"Question {n}?", "choices": ["red", f"green{n}", "rot"], "gold": n % 3} for n in range(5)]
SCHEMA = [{"context_options": ["The cup", "The box"], "continuation": f"is {n}.", "gold": 1} for n in range(2)]
LANGUAGE = [{"context": f" Say {n} ", "continuation": f"word{n}"} for n in range(4)]
TASKS = {
    "choices": ("multiple_choice", 2, "\nAnswer: ", 25, CHOICES),
    "schema": ("schema", 0, None, 50, SCHEMA),
    "language": ("language_modeling", 1, None, 0, LANGUAGE),
}


def core_items(path, **options):
    given = Task(None, BYTES, 1024, path=path, **options)
    return [item for item, _ in items_of(PROTOCOLS["core"], given)]


def test_core_on_an_invented_bundle(tmp_path):
    items = core_items(bundle(tmp_path / "bundle", TASKS))
    by_task = {label: [item for item in items if item.facts["task"] == label] for label in TASKS}
    assert {label: len(part) for label, part in by_task.items()} == {"choices": 5, "schema": 2, "language": 4}

    item = by_task["choices"][0]
    contexts, continuations = zip(*pairs([item]), strict=True)
    assert len(set(contexts)) == 1
    assert contexts[0].startswith("<|endoftext|>Question ")
    assert contexts[0].count("\n\n") == 2  # two examples
    assert contexts[0].count("\nAnswer: ") == 3
    own = re.search(r"Question (\d)\?\nAnswer: $", contexts[0])
    assert own
    assert list(continuations) == ["red", f"green{own[1]}", "rot"]
    shown = re.findall(r"Question (\d)", contexts[0])[:2]
    assert own[1] not in shown  # an item is no example of itself

    item = by_task["schema"][0]
    assert {pair[1] for pair in pairs([item])} == {re.search(r" is \d\.$", pairs([item])[0][1])[0]}
    assert [pair[0] for pair in pairs([item])] == ["<|endoftext|>The cup", "<|endoftext|>The box"]

    context, continuation = pairs([by_task["language"][0]])[0]
    assert re.fullmatch(r"<\|endoftext\|>Say \d word\d\n\nSay \d", context)
    assert re.fullmatch(r" word\d", continuation)


def test_core_is_the_mean_of_centred_accuracies(tmp_path):
    given = Task(None, BYTES, 1024, path=bundle(tmp_path / "bundle", TASKS))
    records = []
    for number, item in enumerate(core_items(given.path)):
        right = number % 2 == 0
        gold = item.facts.get("gold")
        scores = [scored(-1.0 if (i == gold) == right else -9.0, greedy=right) for i in range(len(item.requests))]
        records.append({**item.facts, **core._judge(given, item, scores)})
    accuracies = {label: np.mean([r["correct"] for r in records if r["task"] == label]) for label in TASKS}
    expected = np.mean([(accuracies[label] - entry[3] / 100) / (1 - entry[3] / 100) for label, entry in TASKS.items()])
    value = estimate(PROTOCOLS["core"].metrics[0], records)
    assert value.value == pytest.approx(expected)
    assert set(value.groups) == set(TASKS)
    assert estimate(PROTOCOLS["core"].metrics[1], records).groups == pytest.approx(accuracies)


def test_core_from_an_archive_and_with_a_limit_of_each_task(tmp_path):
    folder = bundle(tmp_path / "bundle", TASKS)
    with zipfile.ZipFile(tmp_path / "bundle.zip", "w") as archive:
        for path in folder.rglob("*.*"):
            archive.write(path, f"eval_bundle/{path.relative_to(folder)}")
    assert pairs(core_items(tmp_path / "bundle.zip")) == pairs(core_items(folder))
    assert len(core_items(folder, limit=1)) == 3


def test_core_crops_from_the_left_and_counts_the_last_token(tmp_path):
    lines = [{"query": "x" * 40, "choices": ["ab", "cd"], "gold": 0}] * 2
    path = bundle(tmp_path / "bundle", {"choices": ("multiple_choice", 0, " ", 50, lines)})
    given = Task(None, BYTES, 16, path=path)
    [(item, _), _] = items_of(PROTOCOLS["core"], given)
    assert [len(request.context) + len(request.continuation) for request in item.requests] == [16, 16]
    assert pairs([item])[0] == ("x" * 13 + " ", "ab")


def test_an_option_that_begins_all_others_is_chosen_only_in_the_first_place(tmp_path):
    lines = [{"query": "q", "choices": ["ab", "abc"], "gold": 0}, {"query": "q", "choices": ["abc", "ab"], "gold": 0}]
    path = bundle(tmp_path / "bundle", {"choices": ("multiple_choice", 0, " ", 50, lines)})
    given = Task(None, BYTES, 64, path=path)
    for item, _ in items_of(PROTOCOLS["core"], given):
        assert len(item.requests) == 1
        assert core.judge_choice(given, item, [scored(-1.0)])["choice"] == 0


# Items that do not fit, and bad files


def test_long_contexts_are_cut_from_the_left_or_refused():
    long = "abcdefghij x"
    [(item, n_cut)] = lambada_items("lambada-openai/last-word", [long], n_ctx=6)
    assert (pairs([item]), n_cut) == ([("fghij", " x")], 5)
    with pytest.raises(InputError, match=r"file, line 1: the item has 10 tokens of context and 2 to score, .* of 6"):
        lambada_items("lambada-openai/last-word-strict", [long], n_ctx=6)
    for name in ("lambada-openai/last-word", "lambada-core"):
        with pytest.raises(InputError, match="file, line 2"):
            lambada_items(name, ["a b", "a abcdefghij"], n_ctx=6)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("lambada-openai/last-word", '{"text": "a b"}\n{"txt": "a b"}\n', "file, line 2: text is missing"),
        ("lambada-openai/last-word", '{"text": "a b"}\n{"text": "a', "file, line 2 is not valid JSON"),
        ("lambada-openai/last-word", '{"text": "word"}\n', "file, line 1: the text must have a last word"),
        ("lambada-openai/last-word", '{"text": "word "}\n', "file, line 1: the text must have a last word"),
        ("lambada-openai/last-word", "[1]\n", "file, line 1 must hold a JSON object"),
        ("lambada-openai/last-word", "", "file has no items"),
        ("hellaswag/completion", '{"ctx": "a", "endings": ["b"], "label": 0}\n', "line 1: endings must be a list"),
        ("hellaswag/completion", '{"ctx": "a", "endings": ["b", " "], "label": 0}\n', "line 1: endings must be"),
        ("hellaswag/completion", '{"ctx": "a", "endings": ["b", "c"], "label": 2}\n', "line 1: label must be"),
        ("hellaswag/completion", '{"endings": ["b", "c"], "label": 1}\n', "line 1: ctx is missing"),
        ("cbt-cn", "1 a\n2 b\n", "file ends within an item"),
        ("cbt-cn", "1 a\n21 the XXXXX\tdog\t\tcat|cow\n", "file, line 2: line 21 must hold"),
        ("cbt-cn", "no number\n", "file, line 1: a line must begin with its number"),
        ("wikitext-2/hf-1024", "", "two are needed"),
    ],
)
def test_bad_files_are_named(name, text, message):
    with pytest.raises(InputError, match=message):
        items_of(PROTOCOLS[name], task(text))


def test_a_label_may_be_a_text():
    [(item, _)] = items_of(PROTOCOLS["hellaswag/completion"], task([{**SWAG, "label": "2"}]))
    assert item.facts["gold"] == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"core.yaml": "icl_tasks: [{label: choices}]"}, "do not describe tasks"),
        ({"core.yaml": "a: ["}, "do not describe tasks"),
        ({"eval_meta_data.csv": "Eval Task,Random baseline\n"}, "do not describe tasks"),
        ({"eval_data/choices.jsonl": '{"query": "a", "choices": ["b", "c"], "gold": 5}\n' * 3}, "line .: gold must be"),
        ({"eval_data/choices.jsonl": '{"query": "a"}\n' * 3}, "line .: choices is missing"),
        ({"eval_data/choices.jsonl": ""}, "needs more than 2 items"),
        ({"eval_data/choices.jsonl": None}, "has no eval_data/choices.jsonl"),
    ],
)
def test_bad_bundles_are_named(tmp_path, change, message):
    folder = bundle(tmp_path / "bundle", {"choices": TASKS["choices"]})
    for name, text in change.items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises(InputError, match=message):
        core_items(folder)


def test_other_bad_input():
    with pytest.raises(InputError, match=r"unknown protocol 'lambada'; choose from lambada-openai/last-word, "):
        find("lambada")
    with pytest.raises(InputError, match=r"hf-1024 needs a model with a context of 1024 tokens; this one has 64"):
        items_of(PROTOCOLS["wikitext-2/hf-1024"], task(WIKI, n_ctx=64))
    with pytest.raises(InputError, match="needs --data"):
        core_items(None)
    with pytest.raises(InputError, match="needs --corpus"):
        items_of(PROTOCOLS["loss"], Task(None, BYTES, 64))
    with pytest.raises(InputError, match="not UTF-8"):
        items_of(PROTOCOLS["ptb"], Task(Content(b"\xff\xfe", "file", "", False), BYTES, 64))


def test_every_protocol_says_what_it_is():
    """Names and metrics are unique, and a published number belongs to a metric."""
    for name, protocol in PROTOCOLS.items():
        assert re.fullmatch(r"[a-z0-9/-]+", name)
        assert protocol.version >= 1
        assert protocol.description.endswith(".")
        assert (protocol.data is None) == (protocol.identify is not None)
        names = [metric.name for metric in protocol.metrics]
        assert len(set(names)) == len(names)
        for size, numbers in protocol.published.items():
            assert size in ("124M", "355M", "774M", "1558M")
            assert set(numbers) <= set(names)
            assert all(math.isfinite(number.value) and number.source for number in numbers.values())
        if protocol.data is not None:
            assert re.fullmatch(r"[0-9a-f]{64}", protocol.data.file.sha256)
            assert protocol.data.file.size > 0


def test_limits_count_items():
    items = [core.Item((), {"g": n % 2}, "") for n in range(6)]
    assert len(list(limited(items, 2))) == 2
    assert len(list(limited(items, 2, "g"))) == 4
    assert len(list(limited(items, None))) == 6
    assert fitted(items[0], 4, False) == (items[0], 0)
