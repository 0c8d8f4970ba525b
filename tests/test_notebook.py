"""The notebook's code runs unchanged in both backends: loading of weights, and its simple training loop."""

import dataclasses

import numpy as np
import optax
import pytest
import torch
from support.models import BACKENDS, TINY, probing_weights, random_batch

import gpt_jax
import gpt_jax.notebook as gpt_jax_notebook
import gpt_torch
import gpt_torch.notebook as gpt_torch_notebook
from parity import notebook
from parity import weights as table
from parity.comparison.compare import compare
from parity.data.tokenizer import ByteTokenizer
from parity.errors import InputError
from parity.storage.download import RemoteFile
from parity.weights import openai, openai_files


@pytest.fixture
def models_dir(tmp_path, monkeypatch):
    """A folder of models that has a tiny model under the name 124M; the network is not used."""
    arrays = dict(table.convert(probing_weights(TINY, np.float32), "huggingface", "openai", TINY))
    openai.write(tmp_path / "124M", TINY, arrays)
    monkeypatch.setenv("GPT_PARITY_OFFLINE", "1")
    names = [path.name for path in (tmp_path / "124M").iterdir()]
    monkeypatch.setattr(openai_files, "model_files", lambda size: [RemoteFile(name) for name in names])
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
    logits = BACKENDS[name].logits(gpt.config, package.export_weights(gpt), tokens)
    expected = BACKENDS["torch"].logits(TINY, probing_weights(TINY, np.float32), tokens)
    result = compare(name, logits, expected, 2e-5)
    assert result.ok, str(result)
    with pytest.raises(InputError, match="unknown model/h2"):
        package.load_weights_into_gpt(package.GPTModel({**cfg, "n_layers": 2}), params)
    with pytest.raises(InputError, match="missing model/wpe"):
        package.load_weights_into_gpt(gpt, {key: value for key, value in params.items() if key != "wpe"})


def test_nesting_round_trip(models_dir):
    _, tensors = openai.read(models_dir / "124M")
    flat = notebook.flatten(notebook.nest(TINY, tensors))
    assert flat.keys() == tensors.keys()
    assert all(np.array_equal(flat[name], np.asarray(tensors[name])) for name in tensors)


# The training functions of the notebook

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
PACKAGES = {"torch": gpt_torch_notebook, "jax": gpt_jax_notebook}
TINY_BYTES = dataclasses.replace(TINY, n_vocab=257)


def loaders(package, **options):
    options = {"batch_size": 4, "max_length": 24, "stride": 24, "tokenizer": ByteTokenizer(), **options}
    return [package.create_dataloader_v1(part, **options) for part in (TEXT[:1500], TEXT[1500:])]


def test_loaders_have_the_same_order_in_both():
    for options in ({}, {"shuffle": False, "drop_last": False}, {"stride": 7, "seed": 3}):
        epochs = []
        for package in PACKAGES.values():
            loader, _ = loaders(package, **options)
            epochs.append([[np.asarray(part) for part in batch] for _ in range(2) for batch in loader])
            assert len(epochs[-1]) == 2 * len(loader)
        for batch, other in zip(*epochs, strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(batch, other, strict=True))
            assert np.array_equal(batch[0][:, 1:], batch[1][:, :-1])
    ordered = np.concatenate([np.asarray(inputs) for inputs, _ in loaders(gpt_torch_notebook, shuffle=False)[0]])
    dataset = gpt_torch_notebook.GPTDatasetV1(TEXT[:1500], ByteTokenizer(), 24, 24)
    assert np.array_equal(ordered[5], dataset[5][0])
    with pytest.raises(InputError, match="a window needs"):
        gpt_torch_notebook.GPTDatasetV1("short", ByteTokenizer(), 24, 24)


def test_training_is_the_same_in_both(tmp_path, capsys):
    """With torch.optim.AdamW and optax.adamw of equal settings, the losses and samples agree."""
    results = {}
    for name, package in PACKAGES.items():
        model = {"torch": gpt_torch, "jax": gpt_jax}[name].GPTModel(TINY_BYTES, seed=1)
        if name == "torch":
            optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
        else:
            optimizer = optax.adamw(3e-3, weight_decay=0.1)
        train, val = loaders(package)
        results[name] = package.train_model_simple(
            model, train, val, optimizer, "cpu", 3, 5, 2, "the quick", ByteTokenizer()
        )
        again = package.evaluate_model(model, *loaders(package, shuffle=False), "cpu", None)
        results[name] += (again, capsys.readouterr().out)
    (losses, val_losses, seen, again, printed), other = results["torch"], results["jax"]
    assert losses == pytest.approx(other[0], rel=1e-4)
    assert val_losses == pytest.approx(other[1], rel=1e-4)
    assert again == pytest.approx(other[3], rel=1e-4)
    assert (seen, printed) == (other[2], other[4])
    assert losses[-1] < losses[0] - 1
    assert printed.startswith("Ep 1 (Step 000000): Train loss 5.")
    assert seen[1] - seen[0] == 5 * 4 * 24
    epochs = np.linspace(0, 3, len(losses))
    assert notebook.plot_losses(epochs, seen, losses, val_losses, tmp_path / "loss.png").stat().st_size > 5000


def test_text_and_ids(capsys):
    for package in PACKAGES.values():
        ids = package.text_to_token_ids("Grüße", ByteTokenizer())
        assert ids.shape == (1, 7)
        assert package.token_ids_to_text(ids, ByteTokenizer()) == "Grüße"
        assert np.isnan(package.calc_loss_loader([], None))


@pytest.mark.parametrize("package", [gpt_torch_notebook, gpt_jax_notebook])
@pytest.mark.parametrize("option", ["batch_size", "max_length", "stride"])
@pytest.mark.parametrize("value", [0, -1])
def test_sizes_below_one_are_refused(package, option, value):
    options = {"batch_size": 2, "max_length": 4, "stride": 4, option: value}
    with pytest.raises(InputError, match=f"^{option} must be at least 1, got {value}"):
        package.create_dataloader_v1("The dog chased the dog. " * 4, tokenizer=ByteTokenizer(), **options)


def test_evaluations_need_a_distance():
    with pytest.raises(InputError, match="eval_freq must be at least 1, got 0"):
        notebook.train_loop(lambda *_: None, lambda: (0.0, 0.0), lambda: None, [], num_epochs=1, eval_freq=0)
