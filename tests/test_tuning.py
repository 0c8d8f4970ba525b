"""Tuning on instructions: the forms of records, the one template, masked targets, buckets, and equal steps."""

import dataclasses
import json

import numpy as np
import pytest
from support.models import BACKENDS, TINY

import parity.tuning.encoding
from parity.comparison.compare import compare
from parity.comparison.protocol import Batch
from parity.config import IGNORE_INDEX
from parity.data.tokenizer import ByteTokenizer, load_tokenizer
from parity.errors import InputError
from parity.training.schedule import learning_rate
from parity.training.settings import recipe
from parity.tuning import embedded, template
from parity.tuning.encoding import Example, encode_example, encode_prompt
from parity.tuning.examples import Examples, bucket, fit
from parity.tuning.records import Conversation, Turn, conversation, read_records, split
from parity.weights import initial_weights

BYTES = ByteTokenizer()
CONFIG = dataclasses.replace(TINY, n_vocab=257, n_ctx=112)


# Records

ONE_TURN = Conversation((Turn("Name a color.", "a warm one", "Red"),), "", "")
FORMS = {
    "alpaca": {"instruction": "Name a color.", "input": "a warm one", "output": "Red"},
    "dolly": {"instruction": "Name a color.", "context": " a warm one\n", "response": "Red", "category": "open_qa"},
}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "And you?"},
        {"role": "assistant", "content": "Fine."},
    ]
}
SHARED = {
    "id": "1",
    "conversations": [
        {"from": name, "value": message["content"]}
        for name, message in zip(("system", "human", "gpt", "human", "gpt"), CHAT["messages"], strict=True)
    ],
}
TWO_TURNS = Conversation((Turn("Hello", "", "Hi."), Turn("And you?", "", "Fine.")), "Be brief.", "")


def write(folder, records, name="data.json"):
    file = folder / name
    if name.endswith(".parquet"):
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(records), file)
    elif name.endswith("l"):
        file.write_text("\n\n".join(map(json.dumps, records)), encoding="utf-8")
    else:
        file.write_text(json.dumps(records), encoding="utf-8")
    return file


@pytest.mark.parametrize("name", ["data.json", "data.jsonl", "data.parquet"])
def test_forms_of_records_in_all_kinds_of_files(tmp_path, name):
    for number, fields in enumerate(FORMS.values()):
        [record] = read_records(write(tmp_path, [fields], f"{number}-{name}"))
        assert conversation(record)._replace(origin="") == ONE_TURN
        assert record.origin.startswith(str(tmp_path))
        assert record.origin.endswith(" 1")
    for number, fields in enumerate((CHAT, SHARED), 2):
        [record] = read_records(write(tmp_path, [fields], f"{number}-{name}"))
        assert conversation(record)._replace(origin="") == TWO_TURNS


BAD_RECORDS = {
    "empty response": ({"instruction": "a", "output": " \n"}, "item 2: the field 'output' is empty"),
    "missing field": ({"instruction": "a"}, "item 2: the fields 'instruction' are none of the known forms: Alpaca"),
    "missing instruction": ({"output": "a", "text": ""}, "item 2: the fields 'output', 'text' are none of the known"),
    "null response": ({"instruction": "a", "output": None}, "item 2: the field 'output' must be text, got None"),
    "number": ({"instruction": 3, "output": "b"}, "item 2: the field 'instruction' must be text, got 3"),
    "no object": (["a"], "item 2 must hold a JSON object"),
    "two users": (
        {"messages": [{"role": "user", "content": "a"}] * 2},
        "item 2, message 2: it is from 'user', where the assistant has to speak",
    ),
    "no answer": (
        {"messages": [{"role": "user", "content": "a"}]},
        "item 2: the conversation does not end with a message of the assistant",
    ),
    "no content": ({"messages": [{"role": "user"}]}, "item 2, message 1 is empty"),
    "no role": ({"messages": [{"content": "a"}]}, "item 2, message 1: the field 'role' is missing"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_one_clear_error(tmp_path, name):
    fields, message = BAD_RECORDS[name]
    with pytest.raises(InputError) as error:
        [conversation(record) for record in read_records(write(tmp_path, [FORMS["alpaca"], fields]))]
    assert f"{tmp_path / 'data.json'}, {message}" in str(error.value)


def test_bad_files(tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"instruction": "a", "output": "b"}\n\n{"instruction": "a"', encoding="utf-8")
    with pytest.raises(InputError, match=r"data\.jsonl, line 3 is not valid JSON"):
        read_records(file)
    (tmp_path / "empty.json").write_text("[]")
    with pytest.raises(InputError, match="holds no records"):
        read_records(tmp_path / "empty.json")
    with pytest.raises(InputError, match=r"none\.json is not a file"):
        read_records(tmp_path / "none.json")
    (tmp_path / "data.csv").write_text("a")
    with pytest.raises(InputError, match=r"data\.csv: this kind of file is not supported"):
        read_records(tmp_path / "data.csv")
    (tmp_path / "data.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match="cannot be read as Parquet"):
        read_records(tmp_path / "data.parquet")


def test_the_split_is_the_books():
    """935 of 1,100 for training, the next 110 for tests, the last 55 for validation."""
    parts = split(range(1100), 0.1, 0.05)
    assert [(len(part), part[0]) for part in parts] == [(935, 0), (110, 935), (55, 1045)]
    for count in range(1, 60):
        train, test, validation = split(range(count), 0.1, 0.05)
        assert [*train, *test, *validation] == list(range(count))


def test_the_embedded_instructions_are_always_the_same():
    records = embedded.instructions()
    assert records == embedded.instructions()
    assert len({(r["instruction"], r["input"]) for r in records}) == len(records) > 500
    assert records[0]["input"] == "deer"
    letters = [r for r in records if "letter" in r["instruction"]]
    assert all(r["output"] == r["input"][0] for r in letters)
    train, test, _ = split(records, 0.1, 0.05)
    words = {r["input"] for r in train}
    assert all(r["input"] in words for r in test if r["input"].isalpha())  # but for the question


# The template


def test_the_template_token_by_token(vocab_bpe):
    """With GPT-2's tokenizer: the headings, the blank lines, and the places where the response begins and ends."""
    tokenizer = load_tokenizer("gpt2", vocab_bpe)
    [segment] = template.render(ONE_TURN)
    text = "### Instruction:\nName a color.\n\n### Input:\na warm one\n\n### Response:\nRed"
    assert segment.prompt + segment.response == text
    example = encode_example([segment], tokenizer)
    pieces = [tokenizer.decode([id]) for id in example.inputs]
    assert pieces == [
        "###", " Instruction", ":", "\n", "Name", " a", " color", ".", "\n", "\n",
        "###", " Input", ":", "\n", "a", " warm", " one", "\n", "\n",
        "###", " Response", ":", "\n", "Red",
    ]  # fmt: skip
    scored = example.targets != IGNORE_INDEX
    assert scored.tolist() == [False] * 22 + [True] * 2
    assert tokenizer.decode(example.targets[scored]) == "Red<|endoftext|>"
    assert encode_prompt([segment], tokenizer) == example.inputs[:23].tolist()

    [alpaca] = template.render(Conversation((Turn("Name a color.", "", "Red"),), "", ""), "alpaca")
    assert alpaca.prompt == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nName a color.\n\n### Response:\n"
    )
    with pytest.raises(InputError, match="template must be one of alpaca, plain"):
        template.render(ONE_TURN, "llama")


def test_several_turns_each_end_with_the_end_of_text():
    segments = template.render(TWO_TURNS)
    texts = [prompt + response for prompt, response in segments]
    assert texts == [
        "Be brief.\n\n### Instruction:\nHello\n\n### Response:\nHi.",
        "### Instruction:\nAnd you?\n\n### Response:\nFine.",
    ]
    example = encode_example(segments, BYTES)
    assert BYTES.decode([*example.inputs, example.targets[-1]]) == "<|endoftext|>".join([*texts, ""])
    assert BYTES.decode(example.targets[example.targets != IGNORE_INDEX]) == "Hi.<|endoftext|>Fine.<|endoftext|>"
    assert BYTES.decode(encode_prompt(segments, BYTES)) == f"{texts[0]}<|endoftext|>{segments[1].prompt}"
    everything = encode_example(segments, BYTES, "all")
    np.testing.assert_array_equal(everything.targets[:-1], everything.inputs[1:])


def test_the_boundary_never_merges(vocab_bpe):
    """Encoded jointly, the prompt has the tokens that it has alone, whatever the response begins with."""
    tokenizer = load_tokenizer("gpt2", vocab_bpe)
    for response in ("a", "A", "1", "'s", "'", ".", "#", "\u00e9", "\u4e16", "\U0001f600", "<|endoftext|>", "(", "--"):
        segments = template.render(Conversation((Turn("x", "", response),), "", ""))
        example = encode_example(segments, tokenizer)
        assert tokenizer.decode(example.targets[example.targets != IGNORE_INDEX]) == response + "<|endoftext|>"
        assert tokenizer.eos_id not in example.inputs  # the literal text is no special token
    with pytest.raises(InputError, match="place: a token crosses from the prompt into the response"):
        encode_example([template.Segment("### Response:\n", "\n\nan answer")], tokenizer, origin="place")


# Planted errors of the encoding: what is scored is read back as text.


def scored_text(segments):
    example = encode_example(segments, BYTES)
    return BYTES.decode(example.targets[example.targets != IGNORE_INDEX])


def unmasked_by_one(monkeypatch):
    right = parity.tuning.encoding.encode_segments

    def wrong(*args):
        return [(ids, n_prompt - 1) for ids, n_prompt in right(*args)]

    monkeypatch.setattr(parity.tuning.encoding, "encode_segments", wrong)


def masked_by_one(monkeypatch):
    right = parity.tuning.encoding.encode_segments

    def wrong(*args):
        return [(ids, n_prompt + 1) for ids, n_prompt in right(*args)]

    monkeypatch.setattr(parity.tuning.encoding, "encode_segments", wrong)


def test_errors_in_the_mask_are_caught(monkeypatch):
    segments = template.render(ONE_TURN)
    assert scored_text(segments) == "Red<|endoftext|>"
    for plant in (unmasked_by_one, masked_by_one):
        with monkeypatch.context() as patch:
            plant(patch)
            assert scored_text(segments) != "Red<|endoftext|>"


# Buckets and batches


def test_buckets():
    sizes = sorted({bucket(length, 1024) for length in range(1, 1025)})
    assert sizes[:9] == [16, 24, 32, 40, 48, 56, 64, 80, 96]
    assert sizes[-4:] == [640, 768, 896, 1024]
    assert all(length <= bucket(length, 1024) <= max(16, 1.25 * length + 8) for length in range(1, 1025))
    assert bucket(20, 20) == 20
    assert len(sizes) < 25


def random_examples(count, longest=90, seed=0):
    generator = np.random.default_rng(seed)
    made = []
    for length in generator.integers(4, longest, count):
        ids = generator.integers(0, 257, length + 1, dtype=np.int32)
        targets = ids[1:].copy()
        targets[: generator.integers(0, length)] = IGNORE_INDEX
        made.append(Example(ids[:-1], targets))
    return made


def test_every_example_occurs_once_per_epoch():
    """Sixteen batches of five are a pool, which is one epoch of eighty examples."""
    dataset = Examples(random_examples(80), 96, 256)
    for epoch in range(3):
        steps = range(16 * epoch, 16 * (epoch + 1))
        assert sorted(index for step in steps for index in dataset.batch_windows(7, step, 5)) == list(range(80))
    assert dataset.batch_windows(7, 3, 5) != dataset.batch_windows(8, 3, 5)
    lengths = [dataset.batch(7, step, 5)[0].shape[1] for step in range(16)]
    assert lengths != sorted(lengths)


def test_places_do_not_change_the_shape():
    """Processes that read different rows of a batch get arrays of the same length."""
    dataset = Examples(random_examples(60), 96, 256)
    for step in range(8):
        inputs, targets = dataset.batch(0, step, 6)
        for part in ([0, 1, 2], [3, 4, 5], [5], []):
            own = dataset.batch(0, step, 6, part)
            np.testing.assert_array_equal(own[0], inputs[part])
            np.testing.assert_array_equal(own[1], targets[part])


def test_in_order_covers_every_target():
    dataset = Examples(random_examples(11), 96, 256)
    batches = list(dataset.in_order(4))
    assert sum(int((targets != IGNORE_INDEX).sum()) for _, targets in batches) == dataset.n_targets
    assert all(inputs.shape == targets.shape and len(inputs) == 4 for inputs, targets in batches)
    assert (batches[-1][1][3:] == IGNORE_INDEX).all()
    halves = zip(dataset.in_order(4, slice(0, 2)), dataset.in_order(4, slice(2, 4)), batches, strict=True)
    for first, second, whole in halves:
        np.testing.assert_array_equal(np.concatenate([first[0], second[0]]), whole[0])
        np.testing.assert_array_equal(np.concatenate([first[1], second[1]]), whole[1])


def book_collate(texts, pad, ignored=-100):
    """Chapter 7's rule: append the end of text, pad with it, shift, and ignore all of it but the first."""
    longest = max(len(ids) + 1 for ids in texts)
    inputs, targets = [], []
    for ids in texts:
        padded = [*ids, pad] + [pad] * (longest - len(ids) - 1)
        inputs.append(padded[:-1])
        shifted = padded[1:]
        ends = [place for place, id in enumerate(shifted) if id == pad]
        for place in ends[1:]:
            shifted[place] = ignored
        targets.append(shifted)
    return np.array(inputs), np.array(targets)


def test_the_books_collate_gives_the_same_targets():
    texts = [BYTES.encode(text) for text in ("one", "some more text", "text")]
    inputs, targets = book_collate(texts, 256)
    assert (targets[:, -1] == -100).sum() == 2
    assert inputs.shape == (3, 14)
    made = []
    for ids in texts:
        tokens = np.array([*ids, 256], np.int32)
        made.append(Example(tokens[:-1], tokens[1:]))
    dataset = Examples(made, 14, 256)
    got_inputs, got_targets = next(dataset.in_order(3))
    np.testing.assert_array_equal(got_inputs, inputs)
    np.testing.assert_array_equal(np.where(got_targets == IGNORE_INDEX, -100, got_targets), targets)


def test_overlong_examples():
    made = random_examples(20, seed=3)
    origins = [f"item {number}" for number in range(1, 21)]
    lengths = np.array([len(example.inputs) for example in made])
    hidden = sum(not Example(e.inputs[:30], e.targets[:30]).n_targets for e in made if len(e.inputs) > 30)
    assert 0 < hidden < (lengths > 30).sum()
    cut = fit(made, origins, 30)
    assert str(cut) == f"{(lengths > 30).sum() - hidden} cut, {hidden} dropped"
    assert max(len(example.inputs) for example in cut.examples) == 30
    assert all(example.n_targets for example in cut.examples)
    dropped = fit(made, origins, 30, "drop")
    assert (dropped.n_cut, dropped.n_dropped) == (0, (lengths > 30).sum())
    first = origins[int(np.argmax(lengths > 30))]
    with pytest.raises(InputError, match=f"{first}: the example has .* positions, more than 30; shorten it"):
        fit(made, origins, 30, "refuse")
    with pytest.raises(InputError, match="none of the 20 examples fits into 2 positions"):
        fit(made, origins, 2, "drop")


# Steps

SETTINGS = dataclasses.replace(
    recipe("tiny").settings, steps=100, batch_size=4, accumulate=2, warmup=10, weight_decay=0.3, clip=2.2
)


def instruction_batches(dataset, steps, A=2):
    for step in range(steps):
        inputs, targets = dataset.batch(0, step, 4)
        lr = learning_rate(step, SETTINGS.lr, SETTINGS.min_lr, SETTINGS.warmup, SETTINGS.steps)
        shape = (A, 4 // A, inputs.shape[1])
        yield Batch(inputs.reshape(shape), targets.reshape(shape), lr)


@pytest.fixture(scope="module")
def dataset():
    records = embedded.instructions()[:60]
    conversations = (Conversation((Turn(r["instruction"], r["input"], r["output"]),), "", "") for r in records)
    return Examples([encode_example(template.render(c), BYTES) for c in conversations], CONFIG.n_ctx, BYTES.eos_id)


def train(name, batches, dtype="float64"):
    settings = dataclasses.replace(SETTINGS, dtype=dtype)
    weights = {n: w.astype(dtype) for n, w in initial_weights(CONFIG, 3).items()}
    before, updates = dict(weights), []

    def after(new):
        updates.append({n: new[n].astype(np.float64) - before[n].astype(np.float64) for n in new})
        before.update(new)

    return np.array(BACKENDS[name].train(CONFIG, weights, settings, batches, after)), updates


def test_every_update_of_a_hundred_steps_on_instructions(dataset):
    """In float64, with batches of several lengths, each of two micro-batches with unequal numbers of targets."""
    given = list(instruction_batches(dataset, 100))
    assert len({batch.inputs.shape for batch in given}) > 2
    counts = [(batch.targets != IGNORE_INDEX).sum(axis=(1, 2)) for batch in given]
    assert sum(a != b for a, b in counts) > 30
    got, want = train("jax", given), train("torch", given)
    assert 0 < (want[0][:, 1] > SETTINGS.clip).sum() < 100
    result = compare("losses and norms", got[0], want[0], 0, 1e-9)
    print(result)
    assert result.ok, str(result)
    for step, (a, b) in enumerate(zip(got[1], want[1], strict=True)):
        for n in b:
            result = compare(f"step {step} {n}", a[n], b[n], 1e-9 * np.abs(b[n]).max() + 1e-300)
            assert result.ok, str(result)


def padded_to_context(batch):
    """One micro-batch as long as the context."""
    parts = (
        np.pad(part, ((0, 0), (0, 0), (0, CONFIG.n_ctx - part.shape[2])), constant_values=value)
        for part, value in ((batch.inputs, 5), (batch.targets, IGNORE_INDEX))
    )
    return Batch(*(part.reshape(1, 4, CONFIG.n_ctx) for part in parts), batch.lr)


@pytest.mark.parametrize("name", BACKENDS)
def test_padding_changes_no_step(dataset, name):
    """Padded to the context, a batch gives the same losses and updates as in its bucket; so does one micro-batch."""
    given = list(instruction_batches(dataset, 2))
    padded = [padded_to_context(batch) for batch in given]
    short, long = train(name, given), train(name, padded)
    assert compare("losses and norms", short[0], long[0], 0, 1e-11).ok
    for a, b in zip(short[1], long[1], strict=True):
        assert all(compare(n, a[n], b[n], 1e-9 * np.abs(b[n]).max() + 1e-300).ok for n in b)


@pytest.mark.optimized  # as users' programs are compiled
def test_losses_of_a_hundred_steps_on_instructions_in_float32(dataset):
    """Within the bounds of training on windows (see tests/test_training_parity.py)."""
    given = [padded_to_context(batch) for batch in instruction_batches(dataset, 100)]  # one program to compile
    (got, _), (want, _) = (train(name, given, "float32") for name in ("jax", "torch"))
    for result in (compare("loss", got[:, 0], want[:, 0], 0, 5e-6), compare("norm", got[:, 1], want[:, 1], 0, 3e-5)):
        print(result)
        assert result.ok, str(result)
