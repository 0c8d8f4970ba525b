"""Texts with labels: files and their pitfalls, the book's balance and split row by row, batches, and reports."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.tuning import classify
from parity.tuning.embedded import labeled_lists
from parity.tuning.labeled import LabeledText, LabeledTexts
from parity.tuning.labels import balanced, labels_of, read_labeled, split_at_random
from parity.weights.classifier import ClassifierConfig

# Quotation marks in each place: around a text, around its beginning, inside, doubled, and around several lines.
LINES = (
    'ham\tSee you at six\n'
    'ham\t"Happy birthday" she said, I forgot\n'
    'spam\t"WIN a prize!"\n'
    'ham\tHe said "no" twice\n'
    'ham\t""Quoted twice"" in vain\n'
    'ham\t"I never close this\n'
    'ham\tand this line is a part of it\n'
    'spam\tso is this one" now\n'
    '\n'
    'spam\t Call 0900 \xa3\xa3\xa3 \n'
    'ham\tAn apostrophe\'s harmless\r\n'
    'ham\t"a ""doubled"" mark"\n'
)  # fmt: skip


def write(folder, text, name="messages.tsv"):
    (folder / name).write_bytes(text.encode() if isinstance(text, str) else text)
    return str(folder / name)


def rows_of(texts):
    return [(text.label, text.text) for text in texts]


def test_lines_are_read_as_pandas_reads_them(tmp_path):
    pandas = pytest.importorskip("pandas")
    file = write(tmp_path, LINES)
    theirs = pandas.read_csv(file, sep="\t", header=None, names=["label", "text"])
    ours = read_labeled(file)
    assert rows_of(ours) == list(zip(theirs["label"], theirs["text"], strict=True))
    assert len(ours) == 9
    assert ours[5].text == "I never close this\nham\tand this line is a part of it\nspam\tso is this one now"
    assert ours[5].record.origin == f"{file}, line 6"
    assert ours[6].record.origin == f"{file}, line 10"
    assert read_labeled(write(tmp_path, LINES, "SMSSpamCollection")) == [
        text._replace(
            record=text.record._replace(origin=text.record.origin.replace("messages.tsv", "SMSSpamCollection"))
        )
        for text in ours
    ]


def test_the_books_split_row_by_row(tmp_path):
    """Balanced, shuffled and divided as chapter 6 does it with pandas, for several numbers of texts."""
    pandas = pytest.importorskip("pandas")
    generator = np.random.default_rng(0)
    for count in (20, 57, 250):
        labels = generator.choice(["ham", "spam"], count, p=[0.8, 0.2])
        labels[:2] = "ham", "spam"
        file = write(tmp_path, "".join(f"{label}\ttext {n}\n" for n, label in enumerate(labels)))
        ours = read_labeled(file)
        table = pandas.read_csv(file, sep="\t", header=None, names=["label", "text"])
        spam, ham = (table[table["label"] == label] for label in ("spam", "ham"))
        both = pandas.concat([ham.sample(len(spam), random_state=123), spam])
        assert rows_of(balanced(ours, ("ham", "spam"), 123)) == list(zip(both["label"], both["text"], strict=True))
        shuffled = both.sample(frac=1, random_state=123).reset_index(drop=True)
        train_end = int(len(shuffled) * 0.7)
        validation_end = train_end + int(len(shuffled) * 0.1)
        parts = shuffled[:train_end], shuffled[validation_end:], shuffled[train_end:validation_end]
        for own, other in zip(split_at_random(balanced(ours, ("ham", "spam"), 123), 123, 0.2, 0.1), parts, strict=True):
            assert rows_of(own) == list(zip(other["label"], other["text"], strict=True))


def test_the_split_has_the_books_sizes():
    """1,494 messages: 1,045 for training, 149 for validation and 300 for tests."""
    parts = split_at_random([str(n) for n in range(1494)], 123, 0.2, 0.1)
    assert [len(part) for part in parts] == [1045, 300, 149]
    for count in range(2, 60):
        assert sorted(n for part in split_at_random(list(range(count)), 123, 0.2, 0.1) for n in part) == list(
            range(count)
        )


def test_records_in_all_kinds_of_files(tmp_path):
    records = [{"text": " a b ", "label": "x", "id": 1}, {"text": "c", "label": 3}, {"text": "d", "label": True}]
    expected = [("x", " a b "), ("3", "c"), ("true", "d")]
    assert rows_of(read_labeled(write(tmp_path, json.dumps(records), "a.json"))) == expected
    assert rows_of(read_labeled(write(tmp_path, "\n".join(map(json.dumps, records)), "a.jsonl"))) == expected
    without = read_labeled(write(tmp_path, "one\nx\ttwo\n", "b.txt"), needs_label=False)
    assert rows_of(without) == [("", "one"), ("x", "two")]
    [alone] = read_labeled(write(tmp_path, '[{"text": "t"}]', "c.json"), needs_label=False)
    assert (alone.label, alone.text) == ("", "t")


def test_labels_are_in_order(tmp_path):
    file = write(tmp_path, "10\ta\n9\tb\n-1\tc\n9\td\n")
    assert labels_of(read_labeled(file), "x") == ("-1", "9", "10")
    file = write(tmp_path, "spam\ta\nham\tb\n10\tc\n")
    assert labels_of(read_labeled(file), "x") == ("10", "ham", "spam")


@pytest.mark.parametrize(
    ("text", "name", "message"),
    [
        ("ham\ta\nspam\tb\tc\n", "m.tsv", "m.tsv, line 2: 3 fields where LABEL<tab>TEXT is expected"),
        ("ham\ta\nspam\n", "m.tsv", "m.tsv, line 2: 1 fields"),
        ('ham\ta\nham\t"b\nham\tc\n', "m.tsv", "m.tsv, line 2: a quotation mark opens the text and is not closed"),
        ("ham\ta\nspam\t \n", "m.tsv", "m.tsv, line 2: the field 'text' is empty"),
        ("ham\ta\n\tb\n", "m.tsv", "m.tsv, line 2: the field 'label' is empty"),
        ("\n\n", "m.tsv", "m.tsv holds no records"),
        (b"ham\t\xff\n", "m.tsv", r"m.tsv is not UTF-8 \(byte 4\)"),
        ("ham\ta\n", "m.csv", "m.csv: this kind of file is not supported; give a .json"),
        ('[{"text": "a", "label": null}]', "m.json", "item 1: the field 'label' is missing"),
        ('[{"text": "a", "label": 1.5}]', "m.json", "item 1: the field 'label' must be text"),
        ('[{"label": "a"}]', "m.json", "item 1: the field 'text' is missing"),
        ('[{"text": 3, "label": "a"}]', "m.json", "item 1: the field 'text' must be text"),
        ("a\t" + "b" * 200_000 + "\n", "m.tsv", "m.tsv, line 1: field larger than field limit"),
    ],
    ids=str,
)
def test_bad_files(tmp_path, text, name, message):
    with pytest.raises(InputError, match=message):
        read_labeled(write(tmp_path, text, name))


def test_a_missing_file_and_one_label(tmp_path):
    with pytest.raises(InputError, match=r"none\.tsv is not a file; give"):
        read_labeled(str(tmp_path / "none.tsv"))
    with pytest.raises(InputError, match=r"m\.tsv: all 2 texts have the label 'ham'; a classifier needs"):
        labels_of(read_labeled(write(tmp_path, "ham\ta\nham\tb\n")), "m.tsv")


def test_the_embedded_texts_are_always_the_same():
    records = labeled_lists()
    assert records == labeled_lists()
    assert len({record["text"] for record in records}) == len(records) == 1200
    texts = read_labeled("rules")
    assert labels_of(texts, "rules") == ("animal", "color", "fruit", "tool")
    train, test, validation = split_at_random(texts, 123, 0.2, 0.1)
    known = {(word, text.label) for text in train for word in re.findall("[a-z]+", text.text)}
    assert all((word, text.label) in known for text in test + validation for word in re.findall("[a-z]+", text.text))


# Batches

CLASSIFIER = ClassifierConfig(("a", "b"), 256)


def texts_of(count):
    generator = np.random.default_rng(1)
    return [
        LabeledText(generator.integers(0, 256, int(length), dtype=np.int32), number % 2)
        for number, length in enumerate(generator.integers(1, 40, count))
    ]


def test_every_text_occurs_once_per_epoch():
    dataset = LabeledTexts(texts_of(80), CLASSIFIER, 64)
    for epoch in range(3):
        steps = range(16 * epoch, 16 * (epoch + 1))
        assert sorted(index for step in steps for index in dataset.batch_windows(7, step, 5)) == list(range(80))
    assert dataset.batch_windows(7, 3, 5) != dataset.batch_windows(8, 3, 5)


def test_places_and_parts_are_rows_of_the_whole():
    dataset = LabeledTexts(texts_of(11), CLASSIFIER, 64)
    for step in range(4):
        whole = dataset.batch(0, step, 6)
        for part in ([0, 1, 2], [5], []):
            for own, arrays in zip(dataset.batch(0, step, 6, part), whole, strict=True):
                np.testing.assert_array_equal(own, arrays[part])
    batches = list(dataset.in_order(4))
    halves = zip(dataset.in_order(4, slice(0, 2)), dataset.in_order(4, slice(2, 4)), batches, strict=True)
    for first, second, whole in halves:
        for a, b, c in zip(first, second, whole, strict=True):
            np.testing.assert_array_equal(np.concatenate([a, b]), c)
    assert batches[-1][1][3:].tolist() == [-1]
    labels = np.concatenate([targets for _, targets, _ in batches])[:11]
    assert labels.tolist() == [text.label for text in dataset.texts]
    inputs, _, lengths = batches[0]
    for row, length, text in zip(inputs, lengths, dataset.texts, strict=False):
        np.testing.assert_array_equal(row[:length], text.inputs)
        assert (row[length:] == 256).all()


# Reports


def test_confusions_as_text():
    table = classify.confusions([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 2)
    assert table.tolist() == [[2, 1], [1, 1]]
    assert classify.accuracy(table) == pytest.approx(0.6)
    assert classify.describe(table, ("ham", "spam")) == "chosen:  ham  spam\nham        2     1\nspam       1     1"
    many = [f"label {number}" for number in range(20)]
    lines = classify.describe(classify.confusions([0, 0, 3], [0, 5, 3], 20), many).splitlines()
    assert lines[0] == "label 0   1 of 2, 1 taken for label 5"
    assert lines[3] == "label 3   1 of 1"


def test_labels_of_a_file(tmp_path):
    """With a classifier that knows the first byte of a text."""

    class Backend:
        @staticmethod
        def classify(model, texts):
            return np.array([[0.75, 0.25] if text[0] == ord("a") else [0.125, 0.875] for text in texts])

    model = SimpleNamespace(classifier=CLASSIFIER, config=SimpleNamespace(n_ctx=4))
    file, out = write(tmp_path, "a\tall\nb\tanother\na\tbad\n"), tmp_path / "out.json"
    summary = classify.predict_labels(Backend, model, ByteTokenizer(), Path(file), out)
    assert summary.startswith(f"3 texts in {out}, 1 of them cut to 4 tokens; 33.33% labeled right, loss 1.2511 nats")
    assert summary.endswith("chosen:  a  b\na        1  1\nb        1  0")
    records = json.loads(out.read_text())
    assert records[1] == {
        "label": "b", "text": "another", "model_label": "a", "probabilities": {"a": 0.75, "b": 0.25},
        "correct": False, "loss": pytest.approx(-np.log(0.25)),
    }  # fmt: skip
    unlabeled = write(tmp_path, '[{"text": "all", "id": 3}]', "u.json")
    assert classify.predict_labels(Backend, model, ByteTokenizer(), Path(unlabeled), out) == f"1 texts in {out}"
    assert json.loads(out.read_text())[0].keys() == {"text", "id", "model_label", "probabilities"}
    with pytest.raises(InputError, match="line 2: the label 'c' is none of the classifier's: a, b"):
        classify.predict_labels(Backend, model, ByteTokenizer(), Path(write(tmp_path, "a\tx\nc\ty\n")), out)
