"""The parity report detects planted errors and names the right activation, and the script writes its files."""

import base64
import dataclasses
import json
import re
import subprocess
import sys
import types

import check_parity
import numpy as np
import parity_hf
import pytest
import torch
from einops import rearrange
from support.models import BACKENDS, TINY, probing_weights
from support.runs import ROOT, run_script

import gpt_torch.adapter
import gpt_torch.model
from parity import taps
from parity.comparison import report, sections
from parity.comparison.case import Case, random_tokens, sharp_weights
from parity.comparison.compare import compare
from parity.comparison.error_bounds import UNIT_ROUNDOFF
from parity.comparison.implementation import Implementation, open_implementation
from parity.comparison.protocol import Compute
from parity.config import PRESETS
from parity.errors import InputError, install_extras
from parity.training.settings import recipe
from parity.weights import hf_config, huggingface, initial_weights

HF = {"hf": ROOT / "scripts" / "parity_hf.py"}
TORCH, JAX = (Implementation(name, BACKENDS[name]) for name in ("torch", "jax"))


def case(dtype="float64", names=("*",), **options):
    weights = {name: array.astype(dtype) for name, array in probing_weights(TINY).items()}
    tokens = random_tokens(TINY, 2, 20)
    return Case(TINY, weights, tokens, Compute(dtype), taps.select(names, TINY), **options)


def changed(**changes):
    """Return gpt_torch with some weights changed: {name, with __ for dots: function of the array}."""

    def activations(config, weights, tokens, names, compute):
        wrong = {name.replace("__", "."): change for name, change in changes.items()}
        new = {name: wrong.get(name, lambda w: w)(array.copy()) for name, array in weights.items()}
        return gpt_torch.adapter.activations(config, new, tokens, names, compute)

    return Implementation("changed", types.SimpleNamespace(activations=activations))


def one_element(w):
    w.reshape(-1)[w.size // 3] *= 1 + 1e-9
    return w


def swap_q_and_k(w):
    q, k, v = np.split(w, 3, axis=-1)
    return np.concatenate([k, q, v], axis=-1)


def interleave_heads(w):
    return rearrange(w, "d (c n h) -> d (n c h)", c=3, n=4)


def patched(target, attribute, wrong):
    def plant(monkeypatch):
        monkeypatch.setattr(target, attribute, wrong)
        return TORCH

    return plant


def wrong_mask(self, x, mask, *args, right=gpt_torch.model.MultiHeadAttention.forward):
    T = mask.shape[-1]
    return right(self, x, torch.ones(T, T, dtype=torch.bool).tril(1), *args)


def no_first_residual(self, x, mask, cache=None, slot=0):
    tap = taps.tap
    x = tap("resid_mid", self.att(tap("ln_1", self.norm1(x)), mask, cache, slot))
    return tap("resid_post", x + self.ff(tap("ln_2", self.norm2(x))))


def scaled_otherwise(self, q, k, v, mask, right=gpt_torch.model.MultiHeadAttention._explicit):
    return right(self, q * (1 + 1e-9), k, v, mask)


def positions_off_by_one(self, tokens, right=torch.nn.Embedding.forward):
    return right(self, (tokens + 1) % 24 if self.num_embeddings == 24 else tokens)


# {planted error: (the first activation that must fail, how it is planted)}
PLANTS = {
    "a token's embedding": ("embed", changed(wte__weight=lambda w: w * (1 + 1e-9))),
    "positions off by one": ("embed", patched(torch.nn.Embedding, "forward", positions_off_by_one)),
    "LayerNorm's eps": ("blocks.0.ln_1", patched(gpt_torch.model, "LAYER_NORM_EPS", 1.0001e-5)),
    "a scale of LayerNorm": ("blocks.1.ln_1", changed(h__1__ln_1__weight=one_element)),
    "query and key swapped": ("blocks.1.attn.q", changed(h__1__attn__c_attn__weight=swap_q_and_k)),
    "heads interleaved": ("blocks.2.attn.q", changed(h__2__attn__c_attn__weight=interleave_heads)),
    "a key's bias": ("blocks.0.attn.k", changed(h__0__attn__c_attn__bias=one_element)),
    "a value's bias": (
        "blocks.2.attn.v",
        changed(h__2__attn__c_attn__bias=lambda w: np.concatenate([w[:40], w[40:] * (1 + 1e-9)])),
    ),
    "scores scaled otherwise": (
        "blocks.0.attn.scores",
        patched(gpt_torch.model.MultiHeadAttention, "_explicit", scaled_otherwise),
    ),
    "a mask one ahead": ("blocks.0.attn.pattern", patched(gpt_torch.model.MultiHeadAttention, "forward", wrong_mask)),
    "a transposed projection": ("blocks.1.attn.out", changed(h__1__attn__c_proj__weight=lambda w: w.T.copy())),
    "no bias of a projection": ("blocks.0.attn.out", changed(h__0__attn__c_proj__bias=lambda w: w * 0)),
    "no residual": ("blocks.0.resid_mid", patched(gpt_torch.model.TransformerBlock, "forward", no_first_residual)),
    "a shift of LayerNorm": ("blocks.2.ln_2", changed(h__2__ln_2__bias=one_element)),
    "the MLP's first matrix": ("blocks.1.mlp.pre", changed(h__1__mlp__c_fc__weight=one_element)),
    "erf GELU": (
        "blocks.0.mlp.post",
        patched(gpt_torch.model.GELU, "forward", lambda self, x: torch.nn.functional.gelu(x)),
    ),
    "the MLP's last bias": ("blocks.2.mlp.out", changed(h__2__mlp__c_proj__bias=one_element)),
    "the final norm": ("ln_f", changed(ln_f__weight=one_element)),
}


@pytest.fixture(scope="module")
def right():
    """gpt_jax without an error, whose activations are computed once."""
    given = case()
    activations = BACKENDS["jax"].activations(given.config, given.weights, given.inputs)
    return Implementation("jax", types.SimpleNamespace(activations=lambda *_: activations))


@pytest.mark.parametrize("what", PLANTS)
@pytest.mark.parametrize("order", [1, -1], ids=["A", "B"])
def test_planted_errors_are_located(right, what, order, monkeypatch):
    first_wrong, planted = PLANTS[what]
    wrong = planted(monkeypatch) if callable(planted) else planted
    rows = list(sections.activations(*[right, wrong][::order], case()))
    first = report.first_failure(rows)
    assert first is not None
    assert first.name == first_wrong
    small, large = (first.error_a, first.error_b)[::order]
    assert large > 10 * max(small, 1e-16)  # the report says which of the two is wrong


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_without_errors_everything_is_within_its_bound(dtype):
    rows = list(sections.compare_implementations(TORCH, JAX, case(dtype), recipe("small").settings))
    assert {row.section for row in rows} == {
        "activations", "gradients", "AdamW updates", "losses", "cached decoding", "sampled tokens",
    }  # fmt: skip
    assert report.first_failure(rows) is None
    # The bounds are not far too large. Each of these sections has 40 rows or more, of many elements that are rounded.
    for section in ("activations", "gradients", "AdamW updates"):
        assert max(row.share for row in rows if row.section == section) > 0.02
    # A loss may be right to its last bit.
    last_bit = UNIT_ROUNDOFF[dtype] * np.log(TINY.n_vocab)
    assert all(row.bound < 50 * last_bit for row in rows if row.section == "losses")


def test_hugging_face_and_numpy_take_part():
    sides = {name: open_implementation(name, TINY, HF) for name in ("hf", "numpy", "jax")}
    rows = list(sections.compare_implementations(sides["jax"], sides["hf"], case("float32"), recipe("small").settings))
    assert len([row for row in rows if row.section == "activations"]) == 3 + 13 * 3  # all but the scores
    assert {row.section for row in rows} == {"activations", "gradients", "cached decoding"}
    assert report.first_failure(rows) is None
    rows = list(sections.compare_implementations(sides["numpy"], sides["jax"], case(), recipe("small").settings))
    assert report.first_failure(rows) is None
    assert all(row.error_a == 0 for row in rows if row.section == "activations")


def test_transformers_computes_on_the_chosen_device(monkeypatch):
    chosen = []
    monkeypatch.setattr(parity_hf, "choose_device", lambda name: chosen.append(name) or torch.device("cpu"))
    given = case("float32")
    parity_hf.logits(given.config, given.weights, given.inputs, Compute("float32", "cuda"))
    assert chosen == ["cuda", "cuda"]  # the model and the tokens


def test_transformers_computes_what_the_folders_own_configuration_says(tmp_path, monkeypatch):
    """A key that changes the function, and that our reader overlooked, shows as a difference."""
    weights = probing_weights(TINY, np.float32)
    huggingface.write(tmp_path, TINY, weights)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scale_attn_by_inverse_layer_idx": True}))
    with pytest.raises(InputError, match="scale_attn_by_inverse_layer_idx"):
        open_implementation(f"hf:{tmp_path}", TINY, HF)
    monkeypatch.delitem(hf_config._REQUIRED, "scale_attn_by_inverse_layer_idx")
    tokens = random_tokens(TINY, 2, 12, 0)

    def logits(implementation):
        return implementation.activations(TINY, weights, tokens, ["logits"], Compute())["logits"]

    ours = logits(open_implementation("numpy", TINY))
    for opened in (open_implementation(f"hf:{tmp_path}", TINY, HF), open_implementation("hf", TINY, HF, str(tmp_path))):
        assert not compare("logits", logits(opened), ours, 2e-5).ok
    path.write_text(json.dumps({**json.loads(path.read_text()), "scale_attn_by_inverse_layer_idx": False}))
    opened = open_implementation("hf", TINY, HF, str(tmp_path))
    assert compare("logits", logits(opened), ours, 2e-5).ok


def test_cached_decoding_needs_the_documented_functions_only():
    adapter = BACKENDS["torch"]
    module = types.SimpleNamespace(activations=adapter.activations, cached_logits=adapter.cached_logits)
    assert report.first_failure([sections.cached_decoding(Implementation("mine", module), case("float32"))]) is None


def test_errors_in_gradients_and_training_are_found(monkeypatch):
    settings = recipe("small").settings

    class Wrong:
        @staticmethod
        def loss_and_gradients(*args):
            loss, gradients = BACKENDS["jax"].loss_and_gradients(*args)
            return loss, {**gradients, "h.1.mlp.c_fc.bias": gradients["h.1.mlp.c_fc.bias"] * (1 + 1e-4)}

        @staticmethod
        def train(config, weights, settings, *args):
            settings = types.SimpleNamespace(**{**vars(settings), "weight_decay": 0.11})
            return BACKENDS["jax"].train(config, weights, settings, *args)

    wrong, given = Implementation("wrong", Wrong), case("float32")
    known = sections.gradient_bounds(given)
    rows = list(sections.gradients(TORCH, wrong, given, known))
    assert [row.name for row in rows if not row.ok] == ["h.1.mlp.c_fc.bias"]
    rows = list(sections.updates(TORCH, wrong, given, settings, known))
    bad = {row.name for row in rows if not row.ok and row.section == "AdamW updates"}
    assert "wte.weight" in bad
    assert not any("bias" in name or "ln_" in name for name in bad)


def test_not_finite_is_beyond_any_bound():
    row = report.make_row("activations", "x", np.array([1.0, np.nan]), np.ones(2), np.ones(2), 1e9)
    assert not row.ok
    assert row.detail == "not finite"


def test_the_script_writes_its_report_and_exits_with_0_or_1(tmp_path):
    out = tmp_path / "report"
    options = ("--positions", 12, "--steps", 2, "--new-tokens", 4, "--out", out)
    result = run_script("check_parity.py", "torch", "jax", *options)
    assert result.returncode == 0, result.stdout + result.stderr
    entries = json.loads((out / "report.json").read_text())
    assert all(row["ok"] for row in entries["rows"])
    page = (out / "report.html").read_text(encoding="utf-8")
    assert page.count("<tr>") == len(entries["rows"]) + len({row["section"] for row in entries["rows"]})
    pictures = re.findall(r"base64,([^']+)'", page)
    assert len(pictures) == 3
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in pictures)
    assert "http" not in page

    mine = tmp_path / "mine.py"
    mine.write_text(
        "from gpt_torch import adapter as backend\n"
        "def activations(config, weights, tokens, names, compute):\n"
        "    wrong = {**weights, 'h.1.ln_2.bias': weights['h.1.ln_2.bias'] + 1e-3}\n"
        "    return backend.activations(config, wrong, tokens, names, compute)\n"
    )
    result = run_script("check_parity.py", "torch", mine, *options, "--sections", "activations")
    assert result.returncode == 1, result.stdout + result.stderr
    assert "the first row beyond its error bound is blocks.1.ln_2 (activations;" in result.stdout


WITHOUT_TORCH = """
import runpy, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError("planted", name="torch")

sys.meta_path.insert(0, NoTorch())
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("numpy", "jax"), 0, "45 rows are within"),
        (("jax", "jax"), 2, f"needs torch, which is not installed: {install_extras('torch')}"),
    ],
)
def test_only_gradients_and_training_need_torch(arguments, status, message, tmp_path):
    script = ROOT / "scripts" / "check_parity.py"
    options = ("--positions", "12", "--sections", "activations", "gradients", "--out", str(tmp_path))
    command = [sys.executable, "-c", WITHOUT_TORCH, str(script), *arguments, *options]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == status, result.stdout + result.stderr
    assert message in result.stdout + result.stderr


def test_own_weights_replace_those_of_the_case():
    calls = []

    def activations(config, weights, *_):
        calls.append(weights["ln_f.bias"])
        return {}

    given, own = case("float64"), {"ln_f.bias": np.full(20, 0.5, np.float32)}
    module = types.SimpleNamespace(activations=activations)
    for own_weights in (None, own):
        Implementation("x", module, own_weights).activations(
            TINY, given.weights, given.inputs, given.names, given.compute
        )
    assert calls[0] is given.weights["ln_f.bias"]
    assert calls[1].dtype == np.float64
    assert (calls[1] == 0.5).all()


def test_the_adapter_restores_the_callers_matmul_precision():
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with gpt_torch.adapter.computing(Compute()):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


def test_two_copies_of_weights(tmp_path):
    gpt_torch.save_pretrained(gpt_torch.adapter.build(TINY, sharp_weights(TINY, 0)), tmp_path / "first")
    gpt_torch.save_pretrained(gpt_torch.adapter.build(TINY, sharp_weights(TINY, 1)), tmp_path / "second")
    for other, status in (("first", 0), ("second", 1)):
        result = run_script(
            "check_parity.py", f"torch:{tmp_path / 'first'}", f"numpy:{tmp_path / other}",
            "--weights", tmp_path / "first", "--sections", "activations", "--out", tmp_path / "report",
        )  # fmt: skip
        assert result.returncode == status, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("torch", "tensorflow"),
            "'tensorflow' is not an implementation; choose one of torch, jax, numpy, hf, or give",
        ),
        (("torch", "jax", "--positions", "25"), "--positions must be in 2..24"),
        (("torch", "jax", "--names", "blocks.7.*"), "no activation is called 'blocks.7.*'"),
        (("torch:nothing", "jax"), "nothing is not a folder"),
    ],
)
def test_bad_options_are_one_line(arguments, message, tmp_path):
    result = run_script("check_parity.py", *arguments, "--out", tmp_path)
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr


def test_weights_of_another_shape_are_refused(tmp_path):
    gpt_torch.save_pretrained(gpt_torch.GPTModel(TINY), tmp_path)
    with pytest.raises(InputError, match="another shape"):
        open_implementation(f"torch:{tmp_path}", PRESETS["small"])


def test_the_shape_is_that_of_the_weights_that_are_named(tmp_path):
    """Of a run folder, a path with ~ or a folder, whichever implementation has it; --weights goes first."""
    config = dataclasses.replace(TINY, n_embd=24, n_ctx=30)
    huggingface.write(tmp_path / "other", config, initial_weights(config, 0))
    named = f"torch:{tmp_path / 'other'}"
    for a, b in ((named, named), (named, "jax"), ("numpy", named)):
        assert check_parity.make_case(check_parity.Args(a, b)).config == config
    for weights in ("initial", "sharp"):
        assert check_parity.make_case(check_parity.Args(named, "jax", weights)).config == TINY
    assert check_parity.make_case(check_parity.Args("torch", "jax")).config == TINY
    with pytest.raises(InputError, match="is not a folder"):
        check_parity.make_case(check_parity.Args("torch:nowhere", named))
    with pytest.raises(InputError, match="--preset small is for initial and sharp weights; those of"):
        check_parity.make_case(check_parity.Args(named, "jax", preset="small"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("torch", "numpy", "--sections", "gradients", "samples"), "nothing to compare: torch or numpy lacks"),
        (("torch", "jax", "--sections"), "nothing to compare"),
        (("torch", "jax", "--batch", "0"), "--batch must be at least 1"),
        (("torch", "jax", "--new-tokens", "-1"), "--new-tokens must be at least 1"),
        (("torch", "jax", "--seed", "-1"), "--seed must be at least 0"),
    ],
    ids=str,
)
def test_a_report_of_nothing_is_refused(options, message, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["check_parity.py", *options, "--out", str(tmp_path / "out")])
    with pytest.raises(InputError, match=message):
        check_parity.main()
    assert not (tmp_path / "out").exists()


def test_sections_that_are_not_compared_are_named(monkeypatch, tmp_path, capsys):
    options = ("torch", "numpy", "--positions", "4", "--sections", "activations", "gradients", "decoding", "samples")
    monkeypatch.setattr(sys, "argv", ["check_parity.py", *options, "--out", str(tmp_path)])
    assert check_parity.main() == 0
    assert "within their error bounds; not compared: gradients, samples;" in capsys.readouterr().out
