"""What the page shows is what NumPy computes in float64 from the same weights, in both backends."""

import base64
import dataclasses
import importlib
import json

import numpy as np
import pytest
from support.models import BACKENDS, TINY, probing_weights
from support.runs import ROOT

from parity import reference, taps
from parity.comparison.protocol import Compute
from parity.data.tokenizer import load_tokenizer
from parity.errors import InputError
from parity.sampling import uniforms
from parity.serving import agreement, display, inspect, interventions, run_views

CONFIG = dataclasses.replace(TINY, n_vocab=257)
WEIGHTS = probing_weights(CONFIG, np.float32)
TOKENIZER = load_tokenizer("bytes")
TEXT = "The cat é"
IDS = [256, *TEXT.encode()]
CLOSE = {"rtol": 1e-3, "atol": 1e-4}  # float32, through sharp attention; a wrong row, head or token is 1,000 times that


@pytest.fixture(scope="module", params=BACKENDS)
def subject(request):
    """The subject of every view."""
    return subject_of(request.param)


def subject_of(name):
    model = BACKENDS[name].build(CONFIG, WEIGHTS, Compute("float32"))
    return inspect.Subject.of(importlib.import_module(f"gpt_{name}"), model, TOKENIZER)


@pytest.fixture(scope="module")
def exact():
    """All activations in float64."""
    return reference.activations(CONFIG, WEIGHTS, np.array([IDS]))


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unpacked(entry, dtype):
    return np.frombuffer(base64.b64decode(entry["data"]), dtype).reshape(entry["shape"])


def patched_logits(ids, patches):
    with taps.probe(CONFIG, ["logits"], patches) as cache:
        reference.logits(CONFIG, WEIGHTS, np.array([ids]))
    return cache["logits"][0]


def test_texts_of_tokens_are_whole_characters():
    entries = display.token_entries(TOKENIZER, [*"aé".encode(), 256, 0xC3])
    assert [entry["text"] for entry in entries] == ["a", "", "é", "", "\ufffd"]
    assert [entry.get("shown") for entry in entries] == [None, "\\xc3", "\\xa9", "<|endoftext|>", "\\xc3"]
    assert display.show_token(TOKENIZER, 300) == "<300>"


def test_each_token_is_judged_by_the_distribution_before_it(subject, exact):
    logits = inspect.token_logits(subject, IDS)
    judged = inspect.judge_tokens(logits, IDS, 1, TOKENIZER)
    assert len(judged) == len(IDS) - 1
    probs = softmax(exact["logits"][0])
    for number, token in enumerate(judged, 1):
        p = probs[number - 1]
        assert token["logprob"] == pytest.approx(np.log(p[IDS[number]]), rel=1e-3)
        assert token["rank"] == (p > p[IDS[number]]).sum() + 1
        assert token["entropy"] == pytest.approx(-(p * np.log(p)).sum(), rel=1e-3, abs=1e-4)
        assert [top["id"] for top in token["top"]] == list(np.argsort(-p)[:10])
    stored = inspect.next_logits(subject, IDS[:4], seed=7)
    assert np.allclose(unpacked(stored["logits"], "<f4"), logits[3], **CLOSE)
    assert stored["uniform"] == uniforms([7], [0], [4], 1)[0, 0]


def test_equal_logits_are_listed_by_id():
    top = display.most_likely(display.log_softmax(np.zeros(40)), TOKENIZER)
    assert [entry["id"] for entry in top] == list(range(10))


def test_the_loss_of_a_text(subject, exact):
    result = inspect.text_loss(subject, TEXT)
    expected = -np.log(softmax(exact["logits"][0])[range(len(IDS) - 1), IDS[1:]]).sum()
    assert result["nats"] == pytest.approx(expected, rel=1e-4)
    assert result["nats_per_token"] == pytest.approx(expected / 10, rel=1e-4)
    assert result["bits_per_byte"] == pytest.approx(expected / np.log(2) / 10, rel=1e-4)
    assert "".join(token["text"] for token in result["tokens"]) == TEXT
    with pytest.raises(InputError, match="the text is empty"):
        inspect.text_loss(subject, "")
    with pytest.raises(InputError, match=r"the text has 25 tokens .* at most 24 fit"):
        inspect.text_loss(subject, "a" * 24)


def test_attention_patterns(subject, exact):
    result = inspect.attention(subject, TEXT, 2)
    pattern = unpacked(result["pattern"], "<u2") / 65535
    assert pattern.shape == (4, len(IDS), len(IDS))
    assert np.allclose(pattern, exact["blocks.2.attn.pattern"][0], **CLOSE)
    with pytest.raises(InputError, match=r"layer must be in 0\.\.2, got 3"):
        inspect.attention(subject, TEXT, 3)


def test_the_lens_ends_in_the_models_prediction(subject, exact, monkeypatch):
    monkeypatch.setattr(inspect, "_CHUNK", 4)  # so that a text has several chunks
    result = inspect.lens(subject, TEXT)
    assert [layer["name"] for layer in result["layers"]] == ["embed", *(f"blocks.{i}.resid_post" for i in range(3))]
    probs = softmax(exact["logits"][0])
    cells = result["layers"][-1]["cells"]
    assert [cell["id"] for cell in cells] == list(probs.argmax(-1))
    assert np.allclose([cell["prob"] for cell in cells], probs.max(-1), **CLOSE)
    assert np.allclose([c["next_prob"] for c in cells[:-1]], probs[range(len(IDS) - 1), IDS[1:]], **CLOSE)
    assert "next_prob" not in cells[-1]
    assert result["layers"][0]["cells"] != cells


def test_attributions_add_up(subject, exact):
    result = inspect.attribution(subject, TEXT, position=4, token=65, minus=66)
    z = exact["logits"][0, 4]
    assert result["total"] == pytest.approx(z[65] - z[66], rel=1e-3, abs=1e-3)
    assert result["logit"] == pytest.approx(z[65] - z[66], rel=1e-3, abs=1e-3)
    assert [part["name"] for part in result["parts"]][:3] == ["embed", "blocks.0.attn.out", "blocks.0.mlp.out"]
    default = inspect.attribution(subject, TEXT)
    assert (default["position"], default["token"]["id"]) == (10, int(exact["logits"][0, -1].argmax()))
    with pytest.raises(InputError, match="token: token id 257 is outside"):
        inspect.attribution(subject, TEXT, token=257)


@pytest.mark.parametrize("replacement", ["zero", "mean"])
def test_ablation_removes_one_head_or_the_mlp(subject, exact, replacement):
    result = interventions.ablate(subject, TEXT, 1, position=6, replacement=replacement)
    assert [entry["label"] for entry in result["after"]] == ["head 0", "head 1", "head 2", "head 3", "MLP"]
    p = softmax(exact["logits"][0, 6])
    assert result["token"]["id"] == p.argmax()

    def emptied(x):
        return x.mean(1, keepdims=True) if replacement == "mean" else 0 * x

    for number, entry in enumerate(result["after"]):
        name = "blocks.1.attn.z" if number < 4 else "blocks.1.mlp.out"
        changed = exact[name].copy()
        changed[:, :, number if number < 4 else slice(None)] = emptied(exact[name])[
            :, :, number if number < 4 else slice(None)
        ]
        q = softmax(patched_logits(IDS, {name: changed})[6])
        assert entry["logprob"] == pytest.approx(np.log(q[p.argmax()]), rel=1e-2, abs=1e-3), entry["label"]
        assert entry["kl"] == pytest.approx((p * np.log(p / q)).sum(), rel=1e-2, abs=1e-3), entry["label"]
        assert entry["top"][0]["id"] == q.argmax()


@pytest.mark.parametrize("kind", interventions.PATCHABLE)
def test_patching_copies_one_position(subject, kind, monkeypatch):
    monkeypatch.setattr(interventions, "_TOKENS_AT_ONCE", 40)  # so that the rows of a layer are several batches
    clean, corrupted = "the dog ran", "the cat sat"
    result = interventions.patch(subject, clean, corrupted, 1, kind)
    ids = [[256, *text.encode()] for text in (clean, corrupted)]
    activations = [reference.activations(CONFIG, WEIGHTS, np.array([row])) for row in ids]
    ends = [cache["logits"][0, -1] for cache in activations]
    answer, other = (int(z.argmax()) for z in ends)
    assert (result["answer"]["id"], result["other"]["id"]) == (answer, other)
    assert result["clean_score"] == pytest.approx(ends[0][answer] - ends[0][other], rel=1e-2, abs=1e-2)
    assert result["corrupted_score"] == pytest.approx(ends[1][answer] - ends[1][other], rel=1e-2, abs=1e-2)
    assert len(result["after"]) == 12
    name = f"blocks.1.{kind}"
    for position, entry in enumerate(result["after"]):
        changed = activations[1][name].copy()
        changed[:, position] = activations[0][name][:, position]
        z = patched_logits(ids[1], {name: changed})[-1]
        assert entry["score"] == pytest.approx(z[answer] - z[other], rel=1e-2, abs=1e-2), position


def test_patched_rows_keep_the_logits_of_one_position_alone(subject):
    rows = interventions._patched(
        subject, IDS, "blocks.1.mlp.out", np.zeros((5, len(IDS), CONFIG.n_embd), np.float32), 3
    )
    owners = {id(row.base): row.base for row in rows}
    assert len(rows) == 5
    assert sum(owner.size for owner in owners.values()) == 5 * CONFIG.n_vocab


def test_prompts_that_cannot_be_patched_are_refused(subject):
    with pytest.raises(InputError, match="the prompts have 1 and 2 tokens"):
        interventions.patch(subject, "a", "ab", 0)
    with pytest.raises(InputError, match="after both prompts the most likely token is"):
        interventions.patch(subject, "ab", "ab", 0)
    with pytest.raises(InputError, match="kind must be one of resid_post"):
        interventions.patch(subject, "ab", "ba", 0, "logits")


def test_logits_of_both_backends_are_within_the_bound_at_each_token():
    logits = {name: inspect.token_logits(subject_of(name), IDS) for name in BACKENDS}
    rows = agreement.compare_logits(CONFIG, WEIGHTS, IDS, 5, logits, "float32")
    assert len(rows) == len(IDS) - 4
    for row in rows:
        assert row["difference"] <= sum(row["errors"].values())
        assert 0 < max(row["errors"].values()) <= row["bound"] < 1e-3
    logits["jax"] = logits["jax"] + 1e-3 * (np.arange(len(IDS)) == 6)[:, None]  # an error at one position
    wrong = agreement.compare_logits(CONFIG, WEIGHTS, IDS, 5, logits, "float32")
    assert [row["errors"]["jax"] > row["bound"] for row in wrong] == [number == 6 for number in range(4, len(IDS))]


def test_runs_have_curves_checkpoints_and_samples(tmp_path):
    assert run_views.list_runs([tmp_path / "none"]) == []
    run = tmp_path / "runs" / "<b>run"
    (run / "checkpoints" / "000002").mkdir(parents=True)
    (run / "config.json").write_text(json.dumps({"preset": "tiny", "train": {"steps": 4}}))
    lines = [{"step": 0, "validation_loss": 3.0}, {"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 3, "lo')
    (run / "samples.txt").write_text("--- step 0 ---\nab\n\n--- step 2 ---\ncd\n\n--- step 2 ---\nef\n\n")
    [entry] = run_views.list_runs([tmp_path / "runs", run])
    assert entry["name"] == "<b>run"
    assert run_views.find_run([tmp_path / "runs"], entry["path"]) == run
    with pytest.raises(InputError, match="there is no run"):
        run_views.find_run([tmp_path / "runs"], str(ROOT))
    described = run_views.describe_run(run)
    assert described["training"] == [(1, 2.5), (2, 2.0)]
    assert described["validation"] == [(0, 3.0)]
    assert described["checkpoints"] == [2]
    assert described["samples"] == [{"step": 0, "texts": ["ab"]}, {"step": 2, "texts": ["cd", "ef"]}]
    json.dumps(described, allow_nan=False)
    before = run_views.run_version(run)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('ss": 1.9}\n')
    assert run_views.run_version(run) != before
    assert run_views.describe_run(run)["training"][-1] == (3, 1.9)
