"""Adapters in files: peft opens ours and we open peft's, and every reader of weights takes them."""

import dataclasses
import json
import shutil
import warnings
from pathlib import Path

import convert as convert_script
import generate as generate_script
import numpy as np
import plan
import pytest
import torch
import transformers
from safetensors.numpy import load_file, save_file
from support.models import TINY, probing_weights, random_batch

import gpt_jax
import gpt_jax.lora
import gpt_torch
import gpt_torch.lora
from gpt_jax.memory import memory
from gpt_jax.sharding import MeshShape
from parity.comparison.compare import compare
from parity.config import PRESETS
from parity.errors import InputError
from parity.storage import manifest
from parity.storage.json import read_object
from parity.weights import adapters, convert, huggingface, peft_files
from parity.weights.adapters import LoraConfig, initial_adapter
from parity.weights.digest import weights_sha256
from parity.weights.load import read_folder
from parity.weights.peft_files import Adapter

PACKAGES = {"torch": gpt_torch, "jax": gpt_jax}
LORA = {"torch": gpt_torch.lora, "jax": gpt_jax.lora}
names = pytest.mark.parametrize("name", PACKAGES)
WEIGHTS = probing_weights(TINY, np.float32)
TOKENS = random_batch(TINY)[0]
ATOL = 2e-5  # of a logit in float32; see support/tolerances.py
OPTIONS = {
    "all": LoraConfig(rank=3, alpha=7.0),
    "q and v": LoraConfig(rank=3, alpha=7.0, targets=("q", "v")),
    "q and a matrix": LoraConfig(rank=2, alpha=5.0, dropout=0.1, targets=("q", "v", "mlp.in"), rslora=True),
    "rslora": LoraConfig(rank=4, alpha=6.0, targets=("qkv", "attn.out"), rslora=True),
}


def values(lora, seed=0):
    """An adapter without zeros outside of the blocks of B that are masked."""
    generator = np.random.default_rng(seed)
    arrays = {
        n: (generator.normal(size=a.shape) * 0.3).astype(np.float32) for n, a in initial_adapter(TINY, lora, 0).items()
    }
    [*linears] = adapters.adapted_linears(lora)
    for name, array in arrays.items():
        if linears[0].parts and "c_attn.lora_B" in name:
            array.reshape(3, -1, array.shape[1])[...] *= linears[0].block_mask[:, None]
    return arrays


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    huggingface.write(folder, TINY, WEIGHTS)
    return folder


@pytest.fixture(scope="module")
def sha256(base):
    return weights_sha256(*read_folder(base))


@pytest.fixture
def adapter(base, sha256, tmp_path):
    """A folder with an adapter that names its base."""
    lora = OPTIONS["q and v"]
    peft_files.write(tmp_path / "adapter", TINY, Adapter(lora, values(lora), str(base), sha256))
    return tmp_path / "adapter"


@pytest.fixture(scope="module")
def peft():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import peft

        return peft


@pytest.fixture
def transformers_model(base, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return lambda: transformers.GPT2LMHeadModel.from_pretrained(base).eval()


def logits(model):
    with torch.inference_mode():
        result = model(torch.from_numpy(TOKENS).long())
    return getattr(result, "logits", result).numpy()


def jax_logits(model):
    return np.asarray(model(TOKENS))


LOGITS = {"torch": logits, "jax": jax_logits}


def assert_close(got, expected):
    result = compare("logits", got, expected, ATOL)
    assert result.ok, str(result)


# peft


@pytest.mark.filterwarnings("ignore")  # peft and transformers warn of each other's deprecations
@pytest.mark.parametrize("options", OPTIONS)
def test_peft_opens_ours(peft, transformers_model, options, tmp_path):
    lora = OPTIONS[options]
    model = gpt_torch.GPTModel(TINY, None)
    gpt_torch.load_weights(model, WEIGHTS)
    peft_files.write(tmp_path / "in", TINY, Adapter(lora, values(lora)))
    gpt_torch.lora.load_adapter(model, tmp_path / "in")
    gpt_torch.lora.save_adapter(model, tmp_path / "out")
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (tmp_path / "in" / file).read_bytes() == (tmp_path / "out" / file).read_bytes()
    theirs = peft.PeftModel.from_pretrained(transformers_model(), tmp_path / "out").eval()
    assert_close(logits(model), logits(theirs))
    merged = theirs.merge_and_unload().state_dict()
    for name, array in gpt_torch.export_weights(gpt_torch.lora.merge(model)).items():
        np.testing.assert_allclose(array, merged[f"transformer.{name}"].numpy(), rtol=0, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"r": 4, "lora_alpha": 32, "target_modules": ["c_attn"]},
        {"r": 5, "lora_alpha": 3, "target_modules": ["c_proj", "c_fc"], "use_rslora": True},
        {"r": 4, "lora_alpha": 9, "target_modules": "all-linear"},
        {"r": 2, "lora_alpha": 9, "target_modules": r".*\.mlp\.c_proj"},
    ],
    ids=lambda options: str(options["target_modules"]),
)
def test_we_open_pefts(peft, transformers_model, base, options, tmp_path):
    config = peft.LoraConfig(**options, fan_in_fan_out=True, task_type="CAUSAL_LM", init_lora_weights=False)
    torch.manual_seed(0)
    theirs = peft.get_peft_model(transformers_model(), config).eval()
    theirs.save_pretrained(tmp_path)
    expected = logits(theirs)
    for name, package in PACKAGES.items():
        model = package.load_pretrained(base)
        LORA[name].load_adapter(model, tmp_path)
        assert_close(LOGITS[name](model), expected)
        assert_close(LOGITS[name](package.load_pretrained(base, adapter=tmp_path)), expected)
    # peft recorded the path of the base.
    assert_close(logits(gpt_torch.load_pretrained(tmp_path)), expected)


# Our own files


@pytest.mark.parametrize("options", OPTIONS)
def test_there_and_back(options, tmp_path):
    lora = OPTIONS[options]
    given = Adapter(lora, values(lora), "355M", "0" * 64)
    peft_files.write(tmp_path, TINY, given)
    read = peft_files.read(tmp_path)
    assert (read.lora, read.base, read.base_sha256) == (lora, "355M", "0" * 64)
    assert read_object(tmp_path / "adapter_config.json")["base_model_name_or_path"] == "openai-community/gpt2-medium"
    for name, array in read.arrays.items():
        np.testing.assert_array_equal(np.asarray(array), given.arrays[name])


@names
def test_a_folder_with_an_adapter_stands_for_the_merged_model(name, base, adapter):
    model = PACKAGES[name].load_pretrained(base)
    LORA[name].load_adapter(model, adapter)
    merged = PACKAGES[name].export_weights(LORA[name].merge(model))
    for folder, options in ((adapter, {}), (base, {"adapter": adapter})):
        loaded = PACKAGES[name].export_weights(PACKAGES[name].load_pretrained(folder, **options))
        for parameter, array in loaded.items():
            np.testing.assert_allclose(array, merged[parameter], rtol=0, atol=1e-6)
    assert np.abs(loaded["h.0.attn.c_attn.weight"] - WEIGHTS["h.0.attn.c_attn.weight"]).max() > 0.1


@pytest.mark.parametrize("format", ["openai", "huggingface", "torch", "flax"])
def test_the_sum_is_the_same_in_every_format(format, adapter):
    lora, arrays = OPTIONS["q and v"], values(OPTIONS["q and v"])
    base = dict(adapters_base(format))
    sums = adapters.merged(base, format, TINY, lora, arrays)
    expected = adapters.merged(dict(adapters_base("huggingface")), "huggingface", TINY, lora, arrays)
    for name, array in convert(sums, format, "huggingface", TINY):
        np.testing.assert_array_equal(array, np.asarray(expected[name]))


def adapters_base(format):
    return convert(WEIGHTS, "huggingface", format, TINY)


def test_the_hash_does_not_depend_on_the_format(base, sha256, tmp_path):
    for format in ("openai", "flax"):
        assert weights_sha256(TINY, dict(adapters_base(format)), format) == sha256
    changed = {**WEIGHTS, "ln_f.bias": WEIGHTS["ln_f.bias"] + 1}
    assert weights_sha256(TINY, changed, "huggingface") != sha256


# Scripts


def run(script, monkeypatch, capsys, *arguments):
    monkeypatch.setattr("sys.argv", [script.__file__, *map(str, arguments)])
    script.main()
    return capsys.readouterr().out


def test_convert_merges(base, adapter, monkeypatch, capsys, tmp_path):
    expected = logits(gpt_torch.load_pretrained(adapter))
    run(convert_script, monkeypatch, capsys, adapter, tmp_path / "a", "--to", "flax", "--verify")
    run(convert_script, monkeypatch, capsys, base, tmp_path / "b", "--adapter", adapter, "--verify")
    for folder in ("a", "b"):
        np.testing.assert_array_equal(logits(gpt_torch.load_pretrained(tmp_path / folder)), expected)


def test_convert_writes_the_adapter_alone(base, sha256, adapter, monkeypatch, capsys, tmp_path):
    (adapter / "optimizer.safetensors").write_bytes(b"")
    out = run(convert_script, monkeypatch, capsys, adapter, tmp_path / "a", "--to", "peft")
    assert "an adapter of 720 parameters" in out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    run(convert_script, monkeypatch, capsys, base, tmp_path / "b", "--to", "peft", "--adapter", adapter)
    for folder in ("a", "b"):
        assert peft_files.read(tmp_path / folder).base == str(base)
        np.testing.assert_array_equal(
            logits(gpt_torch.load_pretrained(tmp_path / folder)), logits(gpt_torch.load_pretrained(adapter))
        )
    with pytest.raises(InputError, match=r"--to peft: .* holds no adapter"):
        run(convert_script, monkeypatch, capsys, base, tmp_path / "c", "--to", "peft")


def test_convert_verifies_the_adapter_alone(base, adapter, monkeypatch, capsys, tmp_path):
    out = run(convert_script, monkeypatch, capsys, adapter, tmp_path / "a", "--to", "peft", "--verify")
    assert "verified against" in out
    given = (base, tmp_path / "b", "--adapter", adapter, "--to", "peft", "--verify")
    assert "verified against" in run(convert_script, monkeypatch, capsys, *given)
    write = peft_files.write

    def write_other(folder, config, stored):
        arrays = {name: 2 * np.asarray(array) for name, array in stored.arrays.items()}
        write(folder, config, dataclasses.replace(stored, arrays=arrays))

    monkeypatch.setattr(peft_files, "write", write_other)
    with pytest.raises(InputError, match="does not compute the same function"):
        run(convert_script, monkeypatch, capsys, adapter, tmp_path / "c", "--to", "peft", "--verify")
    assert not (tmp_path / "c").exists()


def test_generate_takes_an_adapter(vocab_bpe, monkeypatch, capsys, tmp_path):
    config = dataclasses.replace(TINY, n_vocab=50257, n_ctx=32)
    weights, lora = probing_weights(config, np.float32), LoraConfig(rank=2, alpha=8.0)
    huggingface.write(tmp_path / "base", config, weights)
    generator = np.random.default_rng(0)
    arrays = {n: generator.normal(size=a.shape).astype(np.float32) for n, a in initial_adapter(config, lora, 0).items()}
    peft_files.write(tmp_path / "adapter", config, Adapter(lora, arrays, str(tmp_path / "base")))
    options = "--backend", "torch", "--vocab-bpe", vocab_bpe, "--max-new-tokens", "8", "--temperature", "0", "The"
    texts = [
        run(generate_script, monkeypatch, capsys, "--model", tmp_path / "base", *options),
        run(
            generate_script,
            monkeypatch,
            capsys,
            "--model",
            tmp_path / "base",
            "--adapter",
            tmp_path / "adapter",
            *options,
        ),
        run(generate_script, monkeypatch, capsys, "--model", tmp_path / "adapter", *options),
    ]
    assert texts[0] != texts[1] == texts[2]


def test_the_plan_of_an_adapter(monkeypatch, capsys):
    config, lora = PRESETS["1558M"], LoraConfig(rank=16)
    full, adapted = (memory(config, MeshShape(), 1, "float32", lora=option) for option in (None, lora))
    assert adapted.moments == 2 * adapted.gradients == 2 * 4 * 19_660_800
    assert adapted.parameters == full.parameters + adapted.gradients
    # A tenth of a percent of parameters fewer than three copies of the model.
    assert full.total - adapted.total == 3 * full.parameters - 4 * adapted.gradients
    out = run(plan, monkeypatch, capsys, "--preset", "1558M", "--lora-rank", "16")
    assert "19,660,800 more in adapters" in " ".join(out.split())
    with pytest.raises(InputError, match=r"rank .* got 0"):
        run(plan, monkeypatch, capsys, "--lora-rank", "0")
    with pytest.raises(InputError, match="leave out --compile"):
        run(plan, monkeypatch, capsys, "--lora-rank", "4", "--compile")


# Bad input


def edit(folder, **entries):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **entries}))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"use_dora": True}, "use_dora is True, which is not supported"),
        ({"rank_pattern": {"c_fc": 2}}, "rank_pattern is .*c_fc"),
        ({"alpha_pattern": {"c_fc": 2}}, "alpha_pattern is .*c_fc"),
        ({"bias": "all"}, "bias is 'all'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is"),
        ({"layers_to_transform": [0]}, "layers_to_transform is"),
        ({"trainable_token_indices": [5]}, "trainable_token_indices is"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base"),
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"r": 0}, "rank .* got 0"),
        ({"r": 5}, "r is 5, which is not divisible by the number of targets"),
        ({"target_modules": ["mlp.c_fc"]}, "target_modules is .* but adapter_model.safetensors says"),
        ({"something_new": 1}, "something_new is 1"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_changes_the_function_is_refused_by_name(adapter, entries, message):
    edit(adapter, **entries)
    with pytest.raises(InputError, match=rf"adapter_config\.json: .*{message}"):
        peft_files.read(adapter)


@pytest.mark.parametrize(
    "modules",
    [["lm_head"], ["c_attn", "wte"], [], r"transformer\.h\.0\.attn\.c_attn", ["h.1.attn.c_attn"], None, 5],
    ids=str,
)
def test_targets_that_we_do_not_adapt_are_refused(adapter, modules):
    file = adapter / "adapter_model.safetensors"
    save_file(load_file(file), file, {"format": "pt"})  # as peft writes it
    edit(adapter, target_modules=modules)
    with pytest.raises(InputError, match=r"adapter_config\.json: target_modules is"):
        peft_files.read(adapter)


def not_safetensors(folder):
    (folder / "adapter_model.safetensors").write_bytes(b"not a model")


def no_weights(folder):
    (folder / "adapter_model.safetensors").unlink()


def no_config(folder):
    (folder / "adapter_config.json").unlink()


def one_tensor_missing(folder):
    file = folder / "adapter_model.safetensors"
    arrays = load_file(file)
    arrays.pop(max(arrays))
    save_file(arrays, file, {"format": "pt", "targets": "q,v"})


def transposed(folder):
    file = folder / "adapter_model.safetensors"
    save_file({n: a.T.copy() for n, a in load_file(file).items()}, file, {"format": "pt", "targets": "q,v"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (not_safetensors, "cannot be read as safetensors"),
        (no_weights, r"adapter_model\.safetensors is missing"),
        (no_config, r"adapter_config\.json"),
        (one_tensor_missing, "missing base_model.model.transformer.h.2.attn.c_attn.lora_B.weight"),
        (transposed, r"lora_A.weight has shape \[20, 6\], expected \[6, 20\]"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_damaged_adapters(base, adapter, damage, message):
    damage(adapter)
    with pytest.raises(InputError, match=message):
        gpt_torch.load_pretrained(base, adapter=adapter)


def test_an_adapter_for_another_size(adapter, tmp_path):
    other = dataclasses.replace(TINY, n_embd=32)
    huggingface.write(tmp_path / "other", other, probing_weights(other, np.float32))
    with pytest.raises(InputError, match="do not fit a huggingface model of 3 layers, width 32"):
        gpt_torch.load_pretrained(tmp_path / "other", adapter=adapter)


def test_another_base_is_refused(base, adapter, tmp_path):
    changed = {**WEIGHTS, "ln_f.bias": WEIGHTS["ln_f.bias"] + 1}
    huggingface.write(tmp_path / "changed", TINY, changed)
    with pytest.raises(InputError, match=r"other weights than those that the adapter in .* was trained on"):
        read_folder(tmp_path / "changed", adapter)
    edit(adapter, base_model_name_or_path=str(tmp_path / "changed"))
    with pytest.raises(InputError, match="other weights than those"):
        read_folder(adapter)


@pytest.mark.parametrize(
    ("named", "message"),
    [
        (None, "does not name its base; give the base as --model, and the adapter as --adapter"),
        ("somebody/gpt2-finetuned", "base somebody/gpt2-finetuned, which cannot be read"),
        ("itself", "names itself as its base"),
    ],
)
def test_a_base_that_is_not_there(adapter, named, message):
    edit(adapter, base_model_name_or_path=str(adapter) if named == "itself" else named)
    with pytest.raises(InputError, match=message):
        read_folder(adapter)


def test_an_adapter_that_is_not_a_folder(base):
    with pytest.raises(InputError, match="is not a folder with an adapter"):
        read_folder(base, Path("nowhere"))


def test_the_files_of_a_checkpoint_are_checked(base, adapter):
    """A manifest shows an adapter that was changed afterwards."""
    files = manifest.file_hashes(adapter)
    manifest.write(adapter, manifest.Manifest(files, manifest.weights_file(files)))
    read_folder(adapter)
    shutil.copy(adapter / "adapter_config.json", adapter / "copy")
    edit(adapter, lora_alpha=1.0)
    with pytest.raises(InputError, match=r"adapter_config\.json is missing or differs from its sha256"):
        read_folder(adapter)
