"""The classification head: logits, losses and gradients against transformers, its files, and what they refuse."""

import dataclasses
import json
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from support.models import BACKENDS, CONFIGS, TINY, probing_weights
from support.tolerances import GRADIENT_RTOL, LOGITS_ATOL, LOSS_RTOL
from support.trained import full_precision

import gpt_jax
import gpt_jax.classifier
import gpt_torch
import gpt_torch.classifier
from gpt_jax.trainable import parameter_name
from parity.comparison.compare import compare
from parity.config import IGNORE_INDEX
from parity.errors import InputError
from parity.storage import manifest
from parity.tuning.labeled import label_batches, pad_texts
from parity.weights import classifier_files, convert, rows
from parity.weights.adapters import LoraConfig
from parity.weights.classifier import ClassifierConfig, head_rows
from parity.weights.load import read_folder

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
MODULES = {"torch": gpt_torch.classifier, "jax": gpt_jax.classifier}
names = pytest.mark.parametrize("name", PACKAGES)
PAD = TINY.n_vocab - 1
THREE = ClassifierConfig(("ham", "spam", "\u00e9gg"), PAD)
BOOK = ClassifierConfig(("ham", "spam"), PAD, bias=True, position="last", length=14)
TEXTS = [np.random.default_rng(7).integers(0, PAD, length, dtype=np.int32) for length in (3, 12, 1, 16, 7, 7)]


def probing_head(classifier, dtype=np.float64, config=TINY):
    generator = np.random.default_rng(3)
    shape = (len(classifier.labels), config.n_embd)
    arrays = {"score.weight": generator.normal(size=shape) * 0.4, "score.bias": generator.normal(size=shape[0])}
    return {name: arrays[name].astype(dtype) for name in list(arrays)[: 1 + classifier.bias]}


def probing_classifier(name, classifier=THREE, dtype=np.float64, config=TINY):
    model = BACKENDS[name].build(config, probing_weights(config, dtype))
    MODULES[name].add_classifier(model, classifier)
    set_head(name, model, probing_head(classifier, dtype, config))
    return model


def set_head(name, model, arrays):
    package = gpt_torch if name == "torch" else gpt_jax
    package.weights.copy_arrays(model, arrays, "huggingface", "head", head_rows(model.classifier))


def logits_of(name, model, inputs, lengths):
    if name == "torch":
        with torch.inference_mode():
            return gpt_torch.classifier.label_logits(model, torch.tensor(inputs).long(), torch.tensor(lengths)).numpy()
    return np.asarray(jax.jit(gpt_jax.classifier.label_logits)(model, jnp.asarray(inputs), jnp.asarray(lengths)))


def padded(classifier=THREE, texts=TEXTS):
    return pad_texts(texts, classifier, TINY.n_ctx, max(map(len, texts)))


def theirs(folder, dtype=torch.float64):
    """What transformers makes of a folder; whatever it has to say about missing weights is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, output_loading_info=True
        )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model.eval()


# transformers as oracle


@names
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_transformers_opens_a_classifier_with_equal_logits(name, dtype, tmp_path):
    with full_precision():
        model = probing_classifier(name, dtype=dtype)
        MODULES[name].save_classifier(model, tmp_path)
        got = logits_of(name, model, *padded())
    other = theirs(tmp_path, torch.float64 if dtype == np.float64 else torch.float32)
    assert type(other).__name__ == "GPT2ForSequenceClassification"
    assert other.config.id2label == {0: "ham", 1: "spam", 2: "\u00e9gg"}
    with torch.inference_mode():
        expected = other(torch.from_numpy(padded()[0]).long()).logits.numpy()
    assert np.abs(expected).max() > 1
    result = compare("logits", got, expected, LOGITS_ATOL[dtype])
    assert result.ok, str(result)


def their_loss_and_gradients(model, inputs, targets):
    loss = model(torch.from_numpy(inputs).long(), labels=torch.from_numpy(targets).long()).loss
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(loss, list(parameters.values()))
    named = {n.removeprefix("transformer."): g.numpy() for n, g in zip(parameters, gradients, strict=True)}
    return float(loss.detach()), named


def loss_and_gradients(name, model, inputs, targets, lengths):
    """The mean loss, and its gradients in the huggingface format."""
    table = [*rows(model.config), *head_rows(model.classifier)]
    if name == "torch":
        batch = (torch.from_numpy(part).long() for part in (inputs, targets, lengths))
        loss = gpt_torch.classifier.summed_loss(model, *batch) / len(targets)
        parameters = dict(model.named_parameters())
        found, loss = torch.autograd.grad(loss, list(parameters.values())), loss.detach()
        arrays, format = {n: g.numpy() for n, g in zip(parameters, found, strict=True)}, "torch"
    else:

        def mean(model):
            return gpt_jax.classifier.summed_loss(model, *map(jnp.asarray, (inputs, targets, lengths))) / len(targets)

        loss, found = jax.jit(jax.value_and_grad(mean))(model)
        arrays = {parameter_name(p): np.asarray(g) for p, g in jax.tree_util.tree_leaves_with_path(found)}
        format = "flax"
    return float(loss.detach() if name == "torch" else loss), dict(
        convert(arrays, format, "huggingface", model.config, table=table)
    )


def compare_with_theirs(name, folder, dtype=np.float64):
    """Return the comparisons of the loss and of all gradients with those of transformers in float64."""
    targets = np.array([0, 2, 1, 1, 0, 2], np.int32)
    with full_precision():
        model = probing_classifier(name, dtype=dtype)
        MODULES[name].save_classifier(model, folder)
        inputs, lengths = padded()
        loss, gradients = loss_and_gradients(name, model, inputs, targets, lengths)
    their_loss, expected = their_loss_and_gradients(theirs(folder), inputs, targets)
    assert gradients.keys() == expected.keys()
    return [compare("loss", loss, their_loss, 0, LOSS_RTOL[dtype])] + [
        compare(n, gradients[n], expected[n], GRADIENT_RTOL[dtype] * np.abs(expected[n]).max()) for n in expected
    ]


@names
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_loss_and_gradients_are_those_of_transformers(name, dtype, tmp_path):
    for result in compare_with_theirs(name, tmp_path, dtype):
        assert result.ok, str(result)


def wrong_position(name, monkeypatch):
    """The position after the last token."""
    right = MODULES[name].label_logits

    def wrong(model, inputs, lengths, *key):
        return right(model, inputs, (lengths + 1).clip(max=inputs.shape[1]), *key)

    monkeypatch.setattr(MODULES[name], "label_logits", wrong)


def first_position(name, monkeypatch):
    right = MODULES[name].label_logits
    monkeypatch.setattr(MODULES[name], "label_logits", lambda model, x, n, *key: right(model, x, 0 * n + 1, *key))


def padding_read(name, monkeypatch):
    right = MODULES[name].label_logits
    monkeypatch.setattr(
        MODULES[name], "label_logits", lambda model, x, n, *key: right(model, x, 0 * n + x.shape[1], *key)
    )


def labels_reversed(name, monkeypatch):
    right = MODULES[name].label_logits
    turn = (lambda x: x.flip(-1)) if name == "torch" else (lambda x: x[:, ::-1])
    monkeypatch.setattr(MODULES[name], "label_logits", lambda *args: turn(right(*args)))


def mean_of_the_batch(name, monkeypatch):
    right = MODULES[name].summed_loss
    monkeypatch.setattr(MODULES[name], "summed_loss", lambda model, x, *more: right(model, x, *more) / len(x))


@names
@pytest.mark.parametrize("plant", [wrong_position, first_position, padding_read, labels_reversed, mean_of_the_batch])
def test_errors_are_caught(name, plant, monkeypatch, tmp_path):
    plant(name, monkeypatch)
    assert not all(result.ok for result in compare_with_theirs(name, tmp_path))


@names
def test_ignored_rows_have_no_part_in_the_loss(name):
    with full_precision():
        model = probing_classifier(name)
        inputs, lengths = padded()
        targets = np.array([0, 2, IGNORE_INDEX, 1, 0, -100], np.int32)
        loss, gradients = loss_and_gradients(name, model, inputs, targets, lengths)
        kept = np.flatnonzero(targets >= 0)
        part = loss_and_gradients(name, model, inputs[kept], targets[kept], lengths[kept])
    assert loss * 6 == pytest.approx(part[0] * 4, rel=1e-13)
    for n, gradient in gradients.items():
        atol = 1e-12 * np.abs(gradient).max()
        np.testing.assert_allclose(gradient * 6, part[1][n] * 4, rtol=0, atol=atol)


# Padding, and the position that is read


@names
def test_padding_changes_nothing_at_the_last_token(name):
    with full_precision():
        model = probing_classifier(name)
        inputs, lengths = padded()
        other = np.where(np.arange(inputs.shape[1]) < lengths[:, None], inputs, 5)
        assert not np.array_equal(inputs, other)
        np.testing.assert_array_equal(logits_of(name, model, inputs, lengths), logits_of(name, model, other, lengths))


@names
def test_the_books_position_is_the_last_one_of_the_padding(name):
    inputs, lengths = padded(BOOK)
    assert inputs.shape == (6, 14)
    assert lengths.tolist() == [14] * 6
    assert (inputs[0, 3:] == PAD).all()
    np.testing.assert_array_equal(inputs[3], TEXTS[3][:14])
    with full_precision():
        model = probing_classifier(name, BOOK)
        hidden = model.hidden(torch.from_numpy(inputs).long() if name == "torch" else inputs)
        hidden = np.asarray(hidden.detach() if name == "torch" else hidden)
        head = probing_head(BOOK)
        expected = hidden[:, -1] @ head["score.weight"].T + head["score.bias"]
        np.testing.assert_allclose(logits_of(name, model, inputs, lengths), expected, rtol=0, atol=1e-12)


def test_batches_of_texts_cover_all_of_them():
    for count in (1, 5, 32, 70):
        texts = [TEXTS[number % 6] for number in range(count)]
        seen = []
        for numbers, inputs, lengths in label_batches(texts, THREE, TINY):
            assert len(inputs) == len(lengths) == min(32, 1 << (count - 1).bit_length())
            for number, row, length in zip(numbers, inputs, lengths, strict=False):
                np.testing.assert_array_equal(row[:length], texts[number])
            seen += numbers
        assert sorted(seen) == list(range(count))


# Both backends


@pytest.mark.parametrize("classifier", [THREE, BOOK], ids=["three labels", "book"])
@pytest.mark.parametrize("options", CONFIGS)
def test_probabilities_are_equal_in_both_backends(options, classifier):
    config = CONFIGS[options]
    with full_precision():
        models = {name: probing_classifier(name, classifier, config=config) for name in PACKAGES}
        first, second = (PACKAGES[name].classify(model, TEXTS) for name, model in models.items())
    np.testing.assert_allclose(first, second, rtol=0, atol=1e-12)
    np.testing.assert_allclose(first.sum(axis=1), 1, rtol=1e-14)
    assert np.ptp(first, axis=0).max() > 0.1
    for name, model in models.items():
        assert not hasattr(model, "out_head"), name


def test_initial_heads_are_the_same():
    heads = []
    for name, package in PACKAGES.items():
        model = package.GPTModel(TINY)
        package.add_classifier(model, BOOK, seed=4)
        parameter = model.score.weight if name == "torch" else model.score.kernel[...].T
        heads.append(np.asarray(parameter.detach() if name == "torch" else parameter))
        assert not np.asarray(model.score.bias if name == "jax" else model.score.bias.detach()).any()
    np.testing.assert_array_equal(heads[0], heads[1])
    assert 0.01 < heads[0].std() < 0.03


# Files


@pytest.mark.parametrize("classifier", [THREE, BOOK], ids=["three labels", "book"])
@pytest.mark.parametrize("adapted", [False, True], ids=["weights", "adapters"])
def test_both_backends_write_and_read_the_same_files(classifier, adapted, tmp_path):
    base = tmp_path / "base"
    config = CONFIGS["notebook"]
    gpt_torch.save_pretrained(gpt_torch.GPTModel(config, 3), base)
    expected = {}
    for name, package in PACKAGES.items():
        model = package.load_pretrained(base)
        if adapted:
            package.add_lora(model, LoraConfig(rank=2, targets=("q", "v", "mlp.in")), seed=1)
        package.add_classifier(model, classifier)
        set_head(name, model, probing_head(classifier, np.float32))
        package.save_classifier(model, tmp_path / name, str(base))
        expected[name] = package.classify(model, TEXTS)
    files = {path.name for path in (tmp_path / "torch").iterdir()}
    weights = {"adapter_config.json", "adapter_model.safetensors"} if adapted else {"config.json", "model.safetensors"}
    assert files == {"classifier.json", *weights}
    for file in files:
        assert (tmp_path / "torch" / file).read_bytes() == (tmp_path / "jax" / file).read_bytes()
    for name, package in PACKAGES.items():
        got = package.classify(package.load_classifier(tmp_path / "torch"), TEXTS)
        np.testing.assert_allclose(got, expected[name], rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations
def test_peft_opens_adapters_with_their_head(tmp_path, monkeypatch):
    import peft

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    base = gpt_torch.GPTModel(TINY, 3)
    gpt_torch.save_pretrained(base, tmp_path / "base")
    gpt_torch.add_lora(base, LoraConfig(rank=3, alpha=7.0))
    with torch.no_grad():
        for parameter in base.parameters():
            if parameter.requires_grad:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(parameter.numel()))
    gpt_torch.add_classifier(base, THREE)
    set_head("torch", base, probing_head(THREE, np.float32))
    gpt_torch.save_classifier(base, tmp_path / "adapter", str(tmp_path / "base"))
    model = transformers.GPT2ForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, pad_token_id=PAD
    )
    other = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").eval()
    inputs, lengths = padded()
    with torch.inference_mode():
        expected = other(input_ids=torch.from_numpy(inputs).long()).logits.numpy()
    result = compare("logits", logits_of("torch", base, inputs, lengths), expected, LOGITS_ATOL[np.float32])
    assert result.ok, str(result)
    assert np.abs(expected).max() > 1


def test_a_head_that_transformers_cannot_hold_is_refused_for_it_by_name(tmp_path):
    model = gpt_torch.GPTModel(TINY)
    gpt_torch.add_classifier(model, BOOK)
    gpt_torch.save_classifier(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == []
    with pytest.raises(InputError, match=r"GPT2ForSequenceClassification cannot hold .* bias \(score\.bias\) and it"):
        classifier_files.refuse_for_transformers(BOOK, "book")
    classifier_files.refuse_for_transformers(THREE, "ours")


# Bad input


@names
def test_a_classifier_is_refused_where_a_language_model_is_wanted(name, tmp_path):
    package = PACKAGES[name]
    model = package.GPTModel(TINY)
    package.add_classifier(model, THREE)
    package.save_classifier(model, tmp_path / "whole")
    model = package.GPTModel(TINY)
    package.add_lora(model, LoraConfig(rank=1))
    package.add_classifier(model, THREE)
    package.save_classifier(model, tmp_path / "adapter")
    for folder in (tmp_path / "whole", tmp_path / "adapter"):
        with pytest.raises(InputError, match=f"{folder} holds a classifier, which answers with labels"):
            read_folder(folder)
    with pytest.raises(InputError, match="holds a classifier"):
        package.load_adapter(package.GPTModel(TINY), tmp_path / "adapter")
    with pytest.raises(InputError, match=r"is a classifier; write it with save_classifier\(\)"):
        package.export_weights(package.load_classifier(tmp_path / "whole"))
    with pytest.raises(InputError, match="has a classification head already"):
        package.add_classifier(model, THREE)
    with pytest.raises(InputError, match="has no classification head"):
        package.classify(package.GPTModel(TINY), TEXTS)
    with pytest.raises(InputError, match="the classifier's pad_id is 999, outside the model's vocabulary"):
        package.add_classifier(package.GPTModel(TINY), dataclasses.replace(THREE, pad_id=999))
    with pytest.raises(InputError, match="pads texts to 99 tokens, more than the model's context, n_ctx=24"):
        package.add_classifier(package.GPTModel(TINY), dataclasses.replace(BOOK, length=99))


@names
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (np.zeros(TINY.n_ctx + 1, int), "text 1: 25 tokens are more than the model's context, n_ctx=24"),
        ([3, TINY.n_vocab], "text 1: token id 97 is outside the vocabulary 0..96"),
        ([3, 2**40], "text 1: token id 1099511627776 is outside the vocabulary 0..96"),
        ([-1], "text 1: token id -1 is outside the vocabulary 0..96"),
        ([0.5], r"text 1 must be a sequence of token ids \(integers\), got \[0.5\]"),
        (7, r"text 1 must be a sequence of token ids \(integers\), got 7"),
        ([[1], [2, 3]], "text 1 must be a sequence of token ids"),
    ],
    ids=["long", "large", "huge", "negative", "float", "number", "ragged"],
)
def test_bad_texts(name, text, message):
    with pytest.raises(InputError, match=message):
        PACKAGES[name].classify(probing_classifier(name, dtype=np.float32), [TEXTS[0], text])


@names
def test_the_length_of_a_classifier_cuts_texts_and_no_texts_have_no_rows(name):
    model = probing_classifier(name, BOOK, np.float32)
    text = np.arange(30) % PAD
    np.testing.assert_array_equal(*(PACKAGES[name].classify(model, [ids]) for ids in (text, text[: BOOK.length])))
    assert PACKAGES[name].classify(model, [[], text]).shape == (2, 2)
    assert PACKAGES[name].classify(model, []).shape == (0, 2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": ("a",)}, "needs 2 to 65536 different labels, got 1"),
        ({"labels": ("a", "a")}, "different labels, got 1"),
        ({"labels": ("a", "")}, "must be text that is not empty"),
        ({"labels": "ab"}, r'must be a tuple such as \("no", "yes"\), got \'ab\''),
        ({"labels": 3}, "must be a tuple .* got 3"),
        ({"position": "first"}, "position must be one of last-token, last, got 'first'"),
        ({"position": "last"}, "position 'last' needs a length, .* got None"),
        ({"length": 7}, "position 'last-token' has no length, .* got 7"),
        ({"bias": 1}, "must be true or false"),
        ({"pad_id": -1}, "must be the id of a token"),
    ],
    ids=str,
)
def test_bad_options(options, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(THREE, **options)


def test_bad_files(tmp_path):
    model = gpt_torch.GPTModel(TINY)
    gpt_torch.add_classifier(model, THREE)
    gpt_torch.save_classifier(model, tmp_path)
    file = tmp_path / "classifier.json"
    entries = json.loads(file.read_text(encoding="utf-8"))
    for change, message in (
        ({"labels": ["a"]}, "classifier.json: a classifier needs 2 to"),
        ({"labels": "ab"}, "classifier.json must have the keys .* and a list of labels"),
        ({"more": 1}, "classifier.json must have the keys bias, labels, length, pad_id, position"),
        ({"labels": ["a", "b"]}, r"score\.weight has shape \[3, .*\], expected \[2"),
        ({"bias": True}, r"missing score\.bias"),
    ):
        file.write_text(json.dumps({**entries, **change}))
        with pytest.raises(InputError, match=message):
            classifier_files.read(tmp_path)
    file.write_text(json.dumps(entries))
    manifest.write(tmp_path, manifest.Manifest(manifest.file_hashes(tmp_path)))
    file.write_text(json.dumps({**entries, "labels": ["spam", "ham", "egg"]}))
    with pytest.raises(InputError, match=r"classifier\.json is missing or differs from its sha256"):
        classifier_files.read(tmp_path)
    file.unlink()
    with pytest.raises(InputError, match="give a folder or a run of a classifier"):
        classifier_files.read(tmp_path)
