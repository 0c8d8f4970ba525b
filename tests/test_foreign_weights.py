"""Weights as other programs leave them: other names, other files, other formats in one folder, hostile content."""

import dataclasses
import json
import os
import pickle
import re
import sys

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch
from support.models import BACKENDS, CONFIGS, TINY, probing_weights, random_batch

import gpt_jax
import gpt_torch
from parity import weights as table
from parity.comparison.compare import compare
from parity.config import GPTConfig
from parity.errors import InputError
from parity.weights import hf_config, huggingface, names, openai, pickles, tensor_bundle
from parity.weights.lazy import LazyTensor
from parity.weights.load import read_folder

WEIGHTS = probing_weights(TINY, np.float32)
NOTEBOOK = dataclasses.replace(CONFIGS["notebook"], drop_rate=0.0)
EMPTY = LazyTensor("", (), np.dtype(np.float32), lambda: np.zeros(()))
PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}


def folder_with(path, arrays, config=TINY, save=save_file, metadata=None, **entries):
    """A folder with config.json and model.safetensors."""
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({**hf_config.config_to_dict(config), **entries}))
    save(arrays, path / "model.safetensors", metadata)
    return path


def assert_reads(path, config=TINY, expected=WEIGHTS):
    read_config, arrays, format = read_folder(path)
    assert read_config == config
    read = dict(table.convert(arrays, format, "huggingface", config))
    assert read.keys() == expected.keys()
    assert all(np.array_equal(read[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    "rename",
    [
        *(lambda name, prefix=prefix: prefix + name for prefix in (
            "_orig_mod.", "module.", "_orig_mod.module.transformer.", "model.transformer.", "teacher.net.",
            "_fsdp_wrapped_module.transformer.",
        )),
        lambda name: name.replace("h.1.", "h.1._orig_mod."),
        lambda name: "module.transformer." + name.replace(".mlp.", "._checkpoint_wrapped_module.mlp."),
    ],
)  # fmt: skip
def test_names_of_wrapped_models(tmp_path, rename):
    assert_reads(folder_with(tmp_path, {rename(name): array for name, array in WEIGHTS.items()}))


def test_an_untied_head_outside_the_prefix(tmp_path):
    config = dataclasses.replace(TINY, tied_head=False)
    weights = probing_weights(config, np.float32)
    for prefix in ("module.", "a.b."):
        renamed = {prefix + ("" if n == "lm_head.weight" else "transformer.") + n: w for n, w in weights.items()}
        assert_reads(folder_with(tmp_path, renamed, config), config, weights)


@pytest.mark.parametrize("format", ["huggingface", "torch"])
def test_a_tied_matrix_that_is_stored_as_the_head(tmp_path, format):
    """safetensors' save_model keeps one name of a shared tensor: the first one in the order of the alphabet."""
    names = {"huggingface": ("wte.weight", "lm_head.weight"), "torch": ("tok_emb.weight", "out_head.weight")}[format]
    arrays = {n: np.ascontiguousarray(w) for n, w in table.convert(WEIGHTS, "huggingface", format, TINY)}
    arrays[names[1]] = arrays.pop(names[0])
    assert_reads(folder_with(tmp_path, arrays, metadata={names[0]: names[1]}))
    untied = {"tie_word_embeddings": False}
    with pytest.raises(InputError, match=f"missing {names[0]}"):
        read_folder(folder_with(tmp_path, arrays, **untied))


def test_messages_are_short_and_safe_to_print(tmp_path):
    """Neither the number of names nor their length or content reach the terminal as they are."""
    for extra in (
        [f"other.{name}" for name in table.shapes(dataclasses.replace(TINY, n_layer=48), "huggingface")],
        ["\x1b]0;title\x07\x1b[31mx"],
        ["x" * 10**6],
        ["a\nerror: b\x85\u2028c"],
    ):
        folder_with(tmp_path, {**WEIGHTS, **{name: np.zeros(2, np.float32) for name in extra}})
        with pytest.raises(InputError, match="unknown ") as caught:
            read_folder(tmp_path)
        assert len(str(caught.value)) < 1000
        assert str(caught.value).isprintable()
        folder_with(tmp_path, {**WEIGHTS, extra[0]: np.zeros(2, np.int32)})
        with pytest.raises(InputError, match="has dtype I32") as caught:
            read_folder(tmp_path)
        assert len(str(caught.value)) < 1000
        assert str(caught.value).isprintable()
    assert len(str(InputError("x" * 10**7))) < 3000
    assert str(InputError(f"{os.fsdecode(bytes([255]))}\x1b[2J")) == r"\udcff\x1b[2J"


def test_a_configuration_far_larger_than_the_weights_takes_no_memory(tmp_path):
    for entries in ({"n_embd": 2**16, "n_head": 4}, {"n_layer": 4096}, {"vocab_size": 2**24, "n_positions": 2**20}):
        folder_with(tmp_path, WEIGHTS, **entries)
        for package in PACKAGES.values():
            with pytest.raises(InputError, match="weights do not fit"):
                package.load_pretrained(tmp_path)


@pytest.mark.parametrize("dtype", ["int8", "int64", "uint8", "bool", "complex64", "float8_e4m3fn", "float8_e5m2"])
def test_only_floating_point_weights_are_read(tmp_path, dtype):
    tensors = {name: torch.from_numpy(w.copy()) for name, w in WEIGHTS.items()}
    tensors["h.1.mlp.c_fc.weight"] = tensors["h.1.mlp.c_fc.weight"].to(getattr(torch, dtype))
    folder_with(tmp_path, tensors, save=save_torch)
    torch.save(tensors, tmp_path / "weights.pth")
    for path in (tmp_path, tmp_path / "weights.pth"):
        with pytest.raises(InputError, match=rf"{tmp_path.name}.*h\.1\.mlp\.c_fc\.weight has dtype"):
            read_folder(path)
    if "float8" not in dtype:
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        for package in PACKAGES.values():
            model = package.GPTModel(TINY)
            with pytest.raises(InputError, match=r"h\.1\.mlp\.c_fc\.weight has dtype"):
                package.load_weights(model, arrays)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"activation_function": None}, "activation_function is None"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon"),
        ({"n_inner": 40}, "n_inner is 40"),
        ({"pruned_heads": {"0": [1]}}, "pruned_heads"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config"),
        ({"auto_map": {"AutoModelForCausalLM": "modeling.Model"}}, "auto_map"),
        ({"hidden_size": 64}, "n_embd is 20, but hidden_size is 64"),
        ({"max_position_embeddings": 12}, "max_position_embeddings"),
        ({"attn_pdrop": 0.1}, "attn_pdrop is 0.1, embd_pdrop is 0.0, resid_pdrop is 0.0"),
        ({"resid_pdrop": "0.1"}, "resid_pdrop must be a number"),
        ({"embd_pdrop": None}, "embd_pdrop must be a number"),
        ({"attn_pdrop": True}, "attn_pdrop must be a number"),
        ({"resid_pdrop": [0.1]}, "resid_pdrop must be a number"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
        ({"n_head": 3}, "n_head=3"),
        ({"vocab_size": 97.0}, "vocab_size must be an integer"),
        ({"n_layer": "\x1b[31m"}, "n_layer must be an integer"),
        ({"weights_format": ["torch"]}, "weights_format is"),
    ],
)  # fmt: skip
def test_configurations_of_other_functions_are_refused_by_name(tmp_path, entries, message):
    folder_with(tmp_path, WEIGHTS, **entries)
    for package in PACKAGES.values():
        with pytest.raises(InputError, match=r"config\.json: ") as caught:
            package.load_pretrained(tmp_path)
        assert message in str(caught.value)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "entries",
    [
        {"activation_function": "gelu_pytorch_tanh"},
        {"activation_function": "gelu_fast"},
        {"reorder_and_upcast_attn": True},
        {"n_inner": 80},
        {"hidden_size": 20, "num_attention_heads": 4},
        {"attn_pdrop": 0, "embd_pdrop": 0.0},
    ],
)
def test_other_ways_to_state_the_same_function(tmp_path, entries):
    """What is read computes what transformers computes from the same config.json."""
    transformers = pytest.importorskip("transformers")
    assert_reads(folder_with(tmp_path, {f"transformer.{name}": w for name, w in WEIGHTS.items()}, **entries))
    theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    tokens = random_batch(TINY)[0]
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(tokens).long()).logits.numpy()
    got = BACKENDS["torch"].logits(TINY, WEIGHTS, tokens)
    assert compare("logits", got, expected, 2e-5).ok


def test_an_adapter_beside_the_weights_is_not_ignored(tmp_path):
    folder_with(tmp_path, WEIGHTS)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match=r"adapter_config\.json: .* --adapter"):
        read_folder(tmp_path)


def test_dropouts_that_are_not_stated_have_the_values_of_transformers(tmp_path):
    entries = {k: v for k, v in hf_config.config_to_dict(TINY).items() if not k.endswith("pdrop")}
    assert hf_config.config_from_dict(entries, "config.json").drop_rate == 0.1


def notebook_state(config, weights):
    """Weights as the notebook's model has them: query, key and value apart, Linear matrices, the mask as a buffer."""
    state = {}
    for name, array in table.convert(weights, "huggingface", "torch", config):
        name = name.replace("ff.in_proj", "ff.layers.0").replace("ff.out_proj", "ff.layers.2")
        if "qkv_proj" in name:
            for part, value in zip(("W_query", "W_key", "W_value"), np.split(array, 3), strict=True):
                state[name.replace("qkv_proj", part)] = torch.from_numpy(value.copy())
        else:
            state[name] = torch.from_numpy(array.copy())
    for layer in range(config.n_layer):
        mask = torch.triu(torch.ones(config.n_ctx, config.n_ctx), diagonal=1)
        state[f"trf_blocks.{layer}.att.mask"] = mask.bool() if layer % 2 else mask
    return state


NOTEBOOK_DICT = {"vocab_size": 97, "context_length": 24, "emb_dim": 20, "n_heads": 4, "n_layers": 3, "drop_rate": 0.0}


@pytest.mark.parametrize("qkv_bias", [False, True])
@pytest.mark.parametrize("save", ["safetensors", "pth", "nested", "compiled", "legacy"])
def test_models_of_the_notebook(tmp_path, save, qkv_bias):
    config = dataclasses.replace(NOTEBOOK, qkv_bias=qkv_bias)
    weights = probing_weights(config, np.float32)
    state = notebook_state(config, weights)
    path = tmp_path / ("model.safetensors" if save == "safetensors" else "model.pth")
    if save == "safetensors":
        save_torch(state, path)
    elif save == "nested":
        torch.save({"model_state_dict": state, "optimizer_state_dict": {"state": {0: {"step": torch.tensor(5)}}}}, path)
    elif save == "compiled":
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=save == "pth")
    with pytest.raises(InputError, match="any number of heads"):
        read_folder(path)
    (tmp_path / "config.json").write_text(json.dumps({**NOTEBOOK_DICT, "qkv_bias": qkv_bias}))
    assert_reads(path, config, weights)
    tokens = random_batch(config)[0]
    for name, package in PACKAGES.items():
        model = package.load_pretrained(path)
        got = BACKENDS[name].logits(model.config, package.export_weights(model), tokens)
        assert compare(name, got, BACKENDS["torch"].logits(config, weights, tokens), 2e-5).ok


def test_the_shape_of_an_openai_model_needs_no_configuration(tmp_path):
    """The number of heads has no trace in the weights."""
    shapes = {"tok_emb.weight": (50257, 768), "pos_emb.weight": (1024, 768)}
    lazy = {name: dataclasses.replace(EMPTY, name=name, shape=shape) for name, shape in shapes.items()}
    for layers, n_head in ((12, 12), (24, None)):
        blocks = {f"trf_blocks.{i}.norm1.scale": EMPTY for i in range(layers)}
        if n_head is None:
            with pytest.raises(InputError, match="any number of heads"):
                names.notebook_config({**lazy, **blocks}, "x.pth")
        else:
            assert names.notebook_config({**lazy, **blocks}, "x.pth") == GPTConfig(qkv_bias=False)


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_nothing_in_a_pickle_is_executed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"wte.weight": Hostile()}, "a.pth")
    (tmp_path / "b.pth").write_bytes(pickle.dumps(Hostile()))
    (tmp_path / "c.pth").write_bytes(b"\x80\x02}q\x00(K")
    torch.save([torch.zeros(2)], "d.pth")
    torch.save({"wte.weight": torch.zeros(1).expand(97, 20)}, "e.pth")
    torch.save({"wte.weight": torch.zeros(97, 20).to_sparse()}, "f.pth")
    (tmp_path / "g.pth").write_bytes((tmp_path / "d.pth").read_bytes()[:-30])
    folder_with(tmp_path, WEIGHTS)
    for name in "abcdefg":
        with pytest.raises(InputError, match=rf"^{name}\.pth") as caught:
            read_folder(f"{name}.pth")
        assert len(str(caught.value)) < 600
    assert not (tmp_path / "executed").exists()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(InputError, match="not installed"):
        pickles.read_pickle(tmp_path / "e.pth", dict)


def test_pytorch_model_bin(tmp_path):
    folder_with(tmp_path, WEIGHTS)
    (tmp_path / "model.safetensors").unlink()
    torch.save(
        {f"transformer.{n}": torch.from_numpy(w).half() for n, w in WEIGHTS.items()}, tmp_path / "pytorch_model.bin"
    )
    assert_reads(tmp_path, expected={n: w.astype(np.float16).astype(np.float32) for n, w in WEIGHTS.items()})
    save_file(WEIGHTS, tmp_path / "model.safetensors")  # the newer format of the same model comes first
    assert_reads(tmp_path)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_saved_files_have_the_permissions_of_any_new_file(tmp_path, umask):
    previous = os.umask(umask)
    try:
        for package in PACKAGES.values():
            folder = tmp_path / package.__name__
            for _ in range(2):
                package.save_pretrained(package.GPTModel(TINY), folder)
            modes = {file.name: file.stat().st_mode & 0o777 for file in folder.iterdir()}
            assert modes["model.safetensors"] == modes["config.json"] == 0o666 & ~umask
    finally:
        os.umask(previous)
    (folder / "model.safetensors").chmod(0o640)  # as somebody decided since
    package.save_pretrained(package.GPTModel(TINY), folder)
    assert (folder / "model.safetensors").stat().st_mode & 0o777 == 0o640


def openai_weights():
    return dict(table.convert(WEIGHTS, "huggingface", "openai", TINY))


def test_two_formats_in_one_folder(tmp_path):
    """Which model was saved last cannot be seen, so neither is read, and no second one is written."""
    huggingface.write(tmp_path, TINY, WEIGHTS)
    with pytest.raises(InputError, match=r"already holds a model in model\.safetensors"):
        openai.write(tmp_path, TINY, openai_weights())
    openai.write(tmp_path / "openai", TINY, openai_weights())
    with pytest.raises(InputError, match=r"already holds a model in model\.ckpt\.index"):
        huggingface.write(tmp_path / "openai", TINY, WEIGHTS)
    for file in (tmp_path / "openai").iterdir():
        file.rename(tmp_path / file.name)
    with pytest.raises(InputError, match="holds two models"):
        read_folder(tmp_path)


def test_one_file_and_shards_in_one_folder(tmp_path):
    """transformers leaves model.safetensors when it saves shards beside it, and reads it first."""
    huggingface.write(tmp_path, TINY, WEIGHTS)
    huggingface.write(tmp_path, TINY, WEIGHTS)  # the same file again
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {}}))
    with pytest.raises(InputError, match="holds both"):
        read_folder(tmp_path)
    with pytest.raises(InputError, match="already holds a model"):
        huggingface.write(tmp_path, TINY, WEIGHTS)


@pytest.fixture
def finetuned(tmp_path):
    """A checkpoint as a fine-tuning program leaves it, with an older one, optimizer slots and counters."""
    arrays = openai_weights()
    arrays |= {
        f"{name}/{slot}": np.zeros_like(w) for name, w in openai_weights().items() for slot in ("Adam", "Adam_1")
    }
    arrays |= {"beta1_power": np.float32(0.5), "global_step": np.int64(1000), "counter": np.int32(3)}
    tensor_bundle.write_bundle(tmp_path / "model-1000", arrays)
    older = {name: w + 1 for name, w in openai_weights().items()}
    tensor_bundle.write_bundle(tmp_path / "model-999", older)
    (tmp_path / "hparams.json").write_text(json.dumps(openai.hparams(TINY)))
    (tmp_path / "counter").write_text("1001\n")
    (tmp_path / "checkpoint").write_text(
        'model_checkpoint_path: "/home/someone/run1/model-1000"\n'
        'all_model_checkpoint_paths: "/home/someone/run1/model-999"\n'
        'all_model_checkpoint_paths: "/home/someone/run1/model-1000"\n'
    )
    return tmp_path


@pytest.mark.parametrize("package", PACKAGES.values())
def test_checkpoints_of_fine_tuning(finetuned, package):
    with pytest.warns(UserWarning, match=r"left beside them: beta1_power, counter, global_step and 80 more"):
        model = package.load_pretrained(finetuned)
    exported = package.export_weights(model)
    assert all(np.array_equal(exported[name], WEIGHTS[name]) for name in WEIGHTS)


def test_which_checkpoint_of_fine_tuning(finetuned):
    (finetuned / "checkpoint").write_text('model_checkpoint_path: "C:\\\\run\\\\model-999"\n')
    assert_reads(finetuned, expected={name: w + 1 for name, w in WEIGHTS.items()})
    (finetuned / "checkpoint").write_text('model_checkpoint_path: "../../model-5"\n')
    with pytest.raises(InputError, match="names the checkpoint 'model-5'"):
        read_folder(finetuned)
    (finetuned / "checkpoint").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match=r"the checkpoints model-1000, model-999, and no file"):
        read_folder(finetuned)
    for file in finetuned.glob("model-1000.*"):
        file.unlink()
    (finetuned / "checkpoint").unlink()
    assert_reads(finetuned, expected={name: w + 1 for name, w in WEIGHTS.items()})


def test_variables_of_another_model_are_no_optimizer_slots(finetuned):
    arrays = {**openai_weights(), "model/h7/ln_1/g": np.zeros(20, np.float32)}
    tensor_bundle.write_bundle(finetuned / "model-1000", arrays)
    with pytest.raises(InputError, match="unknown model/h7/ln_1/g"):
        read_folder(finetuned)
    arrays = {**openai_weights(), "model/wte": np.zeros((97, 20), np.int32)}
    tensor_bundle.write_bundle(finetuned / "model-1000", arrays)
    with pytest.raises(InputError, match="model/wte has dtype int32"):
        read_folder(finetuned)


def test_keys_that_hparams_json_does_not_have(finetuned):
    (finetuned / "hparams.json").write_text(json.dumps({**openai.hparams(TINY), "attn_scale": 2.0, "precision": "x"}))
    with pytest.raises(InputError, match=r"hparams\.json: attn_scale, precision is not supported"):
        read_folder(finetuned)
    (finetuned / "hparams.json").write_text("[" * 100_000)
    with pytest.raises(InputError, match=r"hparams\.json is nested more than 100 levels deep"):
        read_folder(finetuned)


@pytest.mark.parametrize("prefix", ["", "_orig_mod.transformer.", "module."])
@pytest.mark.parametrize("has_config", [False, True])
def test_models_of_nanogpt_are_named(tmp_path, prefix, has_config):
    """Its checkpoint has the state dict under "model"; its matrices are those of nn.Linear."""
    linear = {n: w.T if w.ndim == 2 and n.startswith("h.") else w for n, w in WEIGHTS.items()}
    linear = {n: w for n, w in linear.items() if not n.endswith("bias")}
    state = {prefix + name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in linear.items()}
    model_args = {"n_layer": 3, "n_head": 4, "n_embd": 20, "block_size": 24, "bias": False, "vocab_size": 97}
    folder_with(tmp_path, {n: np.ascontiguousarray(w) for n, w in linear.items()})
    if not has_config:
        (tmp_path / "config.json").unlink()
    torch.save({"model": state, "model_args": model_args, "iter_num": 1, "best_val_loss": 4.0}, tmp_path / "ckpt.pt")
    for path in [tmp_path / "ckpt.pt", tmp_path / "model.safetensors", *([tmp_path] if has_config else [])]:
        with pytest.raises(InputError, match=f"^{re.escape(str(path))}: this is a model of nanoGPT"):
            read_folder(path)
