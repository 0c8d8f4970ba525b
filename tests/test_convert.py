"""scripts/convert.py, run as a user runs it."""

import dataclasses
import hashlib
import json
import re
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import convert as convert_script
import numpy as np
import pytest
import transformers
from support.models import CONFIGS, TINY, probing_weights

import gpt_jax
import gpt_torch
from parity import weights as table
from parity.comparison.implementation import read_weights
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.training import checkpoints
from parity.weights import hf_config, huggingface, openai

SCRIPT = Path(__file__).parents[1] / "scripts" / "convert.py"


@pytest.fixture
def convert(monkeypatch, capsys):
    """Run the script in this process: convert(*arguments) -> returncode, stdout and stderr."""
    monkeypatch.syspath_prepend(SCRIPT.parent)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        status = 0
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            status = error.code
        out, err = capsys.readouterr()
        return SimpleNamespace(returncode=status, stdout=out, stderr=err)

    return run


@pytest.fixture
def source(tmp_path):
    weights = dict(table.convert(probing_weights(TINY, np.float32), "huggingface", "openai", TINY))
    openai.write(tmp_path / "in", TINY, weights)
    (tmp_path / "in" / "encoder.json").write_text("{}")
    (tmp_path / "in" / "vocab.bpe").write_text("#version: 0.2\n")
    return tmp_path / "in"


def test_there_and_back_to_the_byte(convert, source, tmp_path):
    for name, start, to in (("hf", source, "huggingface"), ("back", tmp_path / "hf", "openai")):
        result = convert(start, tmp_path / name, "--to", to, "--verify")
        assert result.returncode == 0, result.stderr
        assert f"verified against {'gpt_torch' if start == source else 'transformers'}" in result.stdout
    for name in ("model.ckpt.data-00000-of-00001", "model.ckpt.index", "hparams.json", "checkpoint", "vocab.bpe"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes()
    assert {p.name for p in (tmp_path / "hf").iterdir()} == {
        "config.json", "model.safetensors", "manifest.json", "vocab.json", "merges.txt", "generation_config.json",
        "README.md",
    }  # fmt: skip
    entry = json.loads((tmp_path / "back" / "manifest.json").read_text())["tensors"]["model/h1/attn/c_proj/w"]
    stored = np.asarray(openai.read(source)[1]["model/h1/attn/c_proj/w"])
    assert entry == {
        "shape": [1, 20, 20], "axes": "1 (N H) D", "dtype": "float32", "sha256": hashlib.sha256(stored).hexdigest(),
    }  # fmt: skip


@pytest.mark.parametrize("form", ["torch", "flax"])
def test_native_names_too(convert, source, tmp_path, form):
    for name, start, to in (("native", source, form), ("back", tmp_path / "native", "openai")):
        result = convert(start, tmp_path / name, "--to", to, "--verify")
        assert result.returncode == 0, result.stderr
    data = "model.ckpt.data-00000-of-00001"
    assert (tmp_path / "back" / data).read_bytes() == (source / data).read_bytes()
    tensors = json.loads((tmp_path / "native" / "manifest.json").read_text())["tensors"]
    assert {name: tuple(entry["shape"]) for name, entry in tensors.items()} == table.shapes(TINY, form)


def test_a_run_stands_for_its_newest_checkpoint(convert, tmp_path):
    for step in (1, 2):
        weights = probing_weights(TINY, np.float32, seed=step)
        checkpoints.save(tmp_path / "run" / "checkpoints", step, lambda f, w=weights: huggingface.write(f, TINY, w), 2)
    result = convert(tmp_path / "run", tmp_path / "out")
    assert result.returncode == 0, result.stderr
    _, tensors, _ = huggingface.read(tmp_path / "out")
    assert all(np.array_equal(np.asarray(tensors[name]), array) for name, array in weights.items())
    config, arrays = read_weights(str(tmp_path / "run"))
    assert config == TINY
    assert all(np.array_equal(arrays[name], array) for name, array in weights.items())


def test_without_qkv_bias_the_bias_is_zero(convert, tmp_path):
    config = dataclasses.replace(CONFIGS["notebook"], tied_head=True)
    huggingface.write(tmp_path / "in", config, probing_weights(config, np.float32))
    result = convert(tmp_path / "in", tmp_path / "out", "--to", "openai", "--verify")
    assert result.returncode == 0, result.stderr


def test_values_that_are_not_finite_are_named(convert, tmp_path):
    weights = probing_weights(TINY, np.float32)
    weights["h.1.mlp.c_fc.bias"][4] = np.nan
    huggingface.write(tmp_path / "in", TINY, weights)
    with pytest.warns(UserWarning, match=r"h\.1\.mlp\.c_fc\.bias has 1 values that are not finite"):
        convert(tmp_path / "in", tmp_path / "out", "--to", "openai")


def test_refusals_are_one_line(convert, source, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    huggingface.write(tmp_path / "untied", CONFIGS["notebook"], probing_weights(CONFIGS["notebook"], np.float32))
    for arguments, message in (
        ((source, tmp_path / "full"), "not an empty folder"),
        ((tmp_path / "none", tmp_path / "out"), "not a folder"),
        ((tmp_path / "untied", tmp_path / "out", "--to", "openai"), "no place for lm_head"),
    ):
        result = convert(*arguments)
        assert result.returncode == 2
        assert message in result.stderr
        assert "Traceback" not in result.stderr


def test_verify_computes_what_the_sources_own_configuration_says(convert, tmp_path, monkeypatch):
    """A key that changes the function, and that our reader overlooked, would show."""
    huggingface.write(tmp_path / "in", TINY, probing_weights(TINY, np.float32))
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "scale_attn_by_inverse_layer_idx": True}))
    refused = convert(tmp_path / "in", tmp_path / "refused", "--verify")
    assert "scale_attn_by_inverse_layer_idx" in refused.stderr
    monkeypatch.delitem(hf_config._REQUIRED, "scale_attn_by_inverse_layer_idx")
    result = convert(tmp_path / "in", tmp_path / "out", "--verify")
    assert result.returncode == 2
    assert f"{tmp_path / 'out'} does not compute the same function" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


@pytest.mark.parametrize("existing", [False, True])
def test_a_conversion_that_fails_leaves_nothing(convert, source, tmp_path, monkeypatch, existing):
    """A failure while the last file is written: the weights are already there."""
    if existing:
        (tmp_path / "out").mkdir()

    def fail(folder, *_):
        raise InputError(f"{folder}: no manifest")

    monkeypatch.setattr(convert_script, "write_manifest", fail)
    monkeypatch.setattr(convert_script.sys, "argv", ["convert.py", str(source), str(tmp_path / "out")])
    with pytest.raises(InputError, match=rf"^{re.escape(str(tmp_path / 'out'))}: no manifest$"):
        convert_script.main()
    assert sorted(path.name for path in tmp_path.iterdir()) == (["in", "out"] if existing else ["in"])
    assert not existing or not any((tmp_path / "out").iterdir())


def test_an_empty_folder_is_filled(convert, source, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert convert(source, ".", "--to", "openai").returncode == 0
    assert "manifest.json" in {path.name for path in Path.cwd().iterdir()}
    assert openai.read(Path.cwd())[0] == TINY


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
@pytest.mark.parametrize(("stated", "written"), [(0, 0), (5, 5), (None, None), ([1, 2], None), (97, None)])
def test_loading_and_saving_keeps_the_end_of_text(tmp_path, package, stated, written):
    huggingface.write(tmp_path / "in", TINY, probing_weights(TINY, np.float32))
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stated}))
    package.save_pretrained(package.load_pretrained(tmp_path / "in"), tmp_path / "out")
    package.save_pretrained(package.load_pretrained(tmp_path / "out"), tmp_path / "again")
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "again" / name).read_text())["eos_token_id"] == written


@pytest.mark.parametrize(("stated", "written"), [(0, 0), (96, None), (50, 50)])
def test_the_end_of_text_that_the_source_states(convert, tmp_path, stated, written):
    """Version 0.1.0 stated the last id of the vocabulary, whatever it was."""
    huggingface.write(tmp_path / "in", TINY, probing_weights(TINY, np.float32))
    path = tmp_path / "in" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": stated}))
    assert convert(tmp_path / "in", tmp_path / "out").returncode == 0
    for name in ("config.json", "generation_config.json"):
        assert json.loads((tmp_path / "out" / name).read_text())["eos_token_id"] == written


def test_a_run_is_exported_with_its_tokenizer(convert, tmp_path):
    config = dataclasses.replace(TINY, n_vocab=257)
    weights = probing_weights(config, np.float32)
    checkpoints.save(tmp_path / "run" / "checkpoints", 1, lambda folder: huggingface.write(folder, config, weights), 1)
    (tmp_path / "run" / "config.json").write_text(json.dumps({"train": {"tokenizer": "bytes"}}))
    assert convert(tmp_path / "run", tmp_path / "out").returncode == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "naïve\n  x <|endoftext|> 漢\0"
    assert tokenizer.encode(text) == ByteTokenizer().encode(text, "all")
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.eos_token_id == 256
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.generation_config.eos_token_id == 256
