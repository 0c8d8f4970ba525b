"""The forms of Hugging Face's GPT-2 weights that are read, and those that are refused."""

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest
import torch
import transformers
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from support.models import BACKENDS, TINY, probing_weights

import gpt_jax
import gpt_torch
from parity.comparison.protocol import Compute
from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import hf_config, huggingface

WEIGHTS = probing_weights(TINY, np.float32)


@pytest.fixture
def folder(tmp_path):
    huggingface.write(tmp_path, TINY, WEIGHTS)
    return tmp_path


def assert_loads(folder, weights=WEIGHTS):
    for package in (gpt_torch, gpt_jax):
        model = package.load_pretrained(folder)
        out = package.export_weights(model)
        assert out.keys() == weights.keys()
        assert all(np.array_equal(out[name], weights[name]) for name in weights)


def rewrite(folder, arrays, save=save_file):
    save(arrays, folder / "model.safetensors")


def test_with_and_without_prefix_and_buffers_and_tied_head(folder):
    assert_loads(folder)
    buffers = {f"h.{n}.attn.bias": np.tril(np.ones((1, 1, 24, 24), np.float32)) for n in range(3)}
    buffers |= {f"h.{n}.attn.masked_bias": np.array(-1e4, np.float32) for n in range(3)}
    rewrite(folder, {**WEIGHTS, **buffers})
    assert_loads(folder)
    rewrite(folder, {**WEIGHTS, "lm_head.weight": WEIGHTS["wte.weight"].copy()})
    assert_loads(folder)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_sources_become_float32(folder, dtype):
    short = {name: torch.from_numpy(w).to(dtype) for name, w in WEIGHTS.items()}
    rewrite(folder, short, save_torch)
    assert_loads(folder, {name: w.float().numpy() for name, w in short.items()})


def test_what_transformers_saves_in_one_file_and_in_shards(tmp_path):
    entries = {k: v for k, v in hf_config.config_to_dict(TINY).items() if k != "architectures"}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**entries))
    weights = {n.removeprefix("transformer."): p.detach().numpy() for n, p in theirs.named_parameters()}
    for name, size in (("one", "1GB"), ("shards", "20KB")):
        theirs.save_pretrained(tmp_path / name, max_shard_size=size)
        assert_loads(tmp_path / name, weights)
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1


def test_sharded_index_is_not_trusted(tmp_path, folder):
    (folder / "model.safetensors").rename(folder / "a.safetensors")
    index = folder / "model.safetensors.index.json"
    for shard, message in (("../a.safetensors", "not a file beside it"), ("b.safetensors", "is missing")):
        index.write_text(json.dumps({"weight_map": {"wte.weight": shard}}))
        with pytest.raises(InputError, match=message):
            huggingface.read(folder)
    index.write_text("{}")
    with pytest.raises(InputError, match="no weight_map"):
        huggingface.read(folder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activation_function": "gelu"}, "activation_function is 'gelu'"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"model_type": "llama"}, "model_type"),
        ({"n_embd": 10**12}, "n_embd"),
        ({"scale_attn_weights": False}, "scale_attn_weights is False"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_layer": 2}, "unknown h.2"),
        ({"n_positions": 23}, r"wpe.weight has shape \[24, 20\], expected \[23, 20\]"),
    ],
)
def test_configs_of_other_models(folder, change, message):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(InputError, match=message):
        gpt_torch.load_pretrained(folder)


def test_integers_and_names_stored_twice_are_refused(folder):
    rewrite(folder, {**WEIGHTS, "wte.weight": WEIGHTS["wte.weight"].astype(np.int8)})
    with pytest.raises(InputError, match=r"wte\.weight has dtype I8; weights must be one of F64, F32, F16, BF16"):
        huggingface.read(folder)
    rewrite(folder, {**WEIGHTS, "transformer.wte.weight": WEIGHTS["wte.weight"]})
    with pytest.raises(InputError, match=r"wte\.weight is stored a second time"):
        huggingface.read(folder)


def test_configurations_that_config_json_cannot_hold_are_refused(tmp_path):
    @dataclasses.dataclass(frozen=True)
    class LaterConfig(GPTConfig):
        erf_gelu: bool = False

    with pytest.raises(InputError, match=r"config\.json cannot hold erf_gelu=True"):
        huggingface.write(tmp_path / "out", LaterConfig(**TINY.to_dict(), erf_gelu=True), {})
    assert not (tmp_path / "out").exists()
    huggingface.write(tmp_path / "out", LaterConfig(**TINY.to_dict()), WEIGHTS)


def test_bfloat16_models_are_exported_and_saved_in_bfloat16(tmp_path):
    weights = {name: w.astype(ml_dtypes.bfloat16) for name, w in WEIGHTS.items()}
    for backend, package in (("torch", gpt_torch), ("jax", gpt_jax)):
        model = BACKENDS[backend].build(TINY, weights, Compute("bfloat16"))
        exported = package.export_weights(model)
        assert all(w.dtype == ml_dtypes.bfloat16 and np.array_equal(w, weights[name]) for name, w in exported.items())
        package.save_pretrained(model, tmp_path / backend)
        assert_loads(tmp_path / backend, {name: w.astype(np.float32) for name, w in weights.items()})
    assert (tmp_path / "torch" / "model.safetensors").stat().st_size < 3 * sum(w.size for w in WEIGHTS.values())


def test_pickles_cut_and_missing_files(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    torch.save({"wte.weight": torch.zeros(3)}, path)
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        gpt_torch.load_pretrained(folder)
    path.write_bytes(whole[:-10])
    with pytest.raises(InputError, match="cannot be read as safetensors"):
        gpt_jax.load_pretrained(folder)
    path.unlink()
    with pytest.raises(InputError, match="is missing"):
        gpt_jax.load_pretrained(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(InputError, match="JSON object"):
        gpt_jax.load_pretrained(folder)
    (folder / "config.json").unlink()
    with pytest.raises(InputError, match="cannot be read"):
        gpt_jax.load_pretrained(folder)
    with pytest.raises(InputError, match="not a folder"):
        gpt_jax.load_pretrained(path)


def test_a_head_that_should_be_tied(folder):
    rewrite(folder, {**WEIGHTS, "lm_head.weight": WEIGHTS["wte.weight"] + 1})
    with pytest.raises(InputError, match="says that they are tied"):
        huggingface.read(folder)
    untied = dataclasses.replace(TINY, tied_head=False)
    huggingface.write(folder, untied, {**WEIGHTS, "lm_head.weight": WEIGHTS["wte.weight"] + 1})
    assert not gpt_torch.load_pretrained(folder).config.tied_head


@pytest.mark.parametrize(("saver", "loader"), [(gpt_torch, gpt_jax), (gpt_jax, gpt_torch)])
def test_saved_by_one_backend_loaded_by_the_other(saver, loader, tmp_path):
    model = saver.GPTModel(TINY, seed=3)
    saver.save_pretrained(model, tmp_path)
    prompts = [[1, 2, 3], [50]]
    assert loader.generate(loader.load_pretrained(tmp_path), prompts, 12) == saver.generate(model, prompts, 12)


def test_values_that_are_not_finite_are_named(folder):
    weights = {name: w.copy() for name, w in WEIGHTS.items()}
    weights["h.1.mlp.c_fc.bias"][4] = np.nan
    weights["wte.weight"][4] = np.inf
    huggingface.write(folder, TINY, weights)
    for package, name in ((gpt_torch, r"ff\.in_proj\.bias"), (gpt_jax, r"ff\.in_proj\.bias")):
        with pytest.warns(UserWarning, match="not finite") as caught:
            package.load_pretrained(folder)
        assert len(caught) == 2
        assert any(re.search(f"{name} has 1 values", str(w.message)) for w in caught)
