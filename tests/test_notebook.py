"""The notebook's loading code, unchanged, in both backends."""

import numpy as np
import pytest
from conftest import BACKENDS, TINY, probing_weights, random_batch

import gpt_jax
import gpt_torch
from parity import download, notebook, openai_checkpoint
from parity import weights as table
from parity.compare import compare
from parity.download import Wanted
from parity.errors import InputError


@pytest.fixture
def models_dir(tmp_path, monkeypatch):
    """A models folder with a tiny model under the name 124M, and no network."""
    arrays = dict(table.convert(probing_weights(TINY, np.float32), "huggingface", "openai", TINY))
    openai_checkpoint.write(tmp_path / "124M", TINY, arrays)
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    names = [path.name for path in (tmp_path / "124M").iterdir()]
    monkeypatch.setattr(download, "model_files", lambda size: [Wanted(name) for name in names])
    return tmp_path


@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("tied_head", [True, False])
def test_download_and_load_and_assign(models_dir, name, tied_head):
    settings, params = notebook.download_and_load_gpt2(model_size="124M", models_dir=str(models_dir))
    assert settings == {"n_vocab": 97, "n_ctx": 24, "n_embd": 20, "n_head": 4, "n_layer": 3}
    assert params.keys() == {"blocks", "b", "g", "wpe", "wte"}
    assert params["blocks"][0]["attn"]["c_attn"]["w"].shape == (20, 60)
    cfg = {
        "vocab_size": 97, "context_length": 24, "emb_dim": 20, "n_heads": 4, "n_layers": 3, "drop_rate": 0.0,
        "qkv_bias": True, "tied_head": tied_head,
    }  # fmt: skip
    package = {"torch": gpt_torch, "jax": gpt_jax}[name]
    gpt = package.GPTModel(cfg)
    package.load_weights_into_gpt(gpt, params)
    tokens = random_batch(TINY)[0]
    got = BACKENDS[name].logits(gpt.config, package.export_weights(gpt), tokens)
    want = BACKENDS["torch"].logits(TINY, probing_weights(TINY, np.float32), tokens)
    result = compare(name, got, want, 2e-5)
    assert result.ok, str(result)
    with pytest.raises(InputError, match="unknown model/h2"):
        package.load_weights_into_gpt(package.GPTModel({**cfg, "n_layers": 2}), params)
    with pytest.raises(InputError, match="missing model/wpe"):
        package.load_weights_into_gpt(gpt, {key: value for key, value in params.items() if key != "wpe"})


def test_nesting_round_trip(models_dir):
    _, tensors = openai_checkpoint.read(models_dir / "124M")
    back = notebook.flatten(notebook.nest(TINY, tensors))
    assert back.keys() == tensors.keys()
    assert all(np.array_equal(back[name], np.asarray(tensors[name])) for name in tensors)
