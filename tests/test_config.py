import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from support.models import TINY

import gpt_jax
import gpt_torch
from parity.config import IGNORE_INDEX, PRESETS, GPTConfig, as_config, is_counted
from parity.errors import InputError
from parity.training.run_config import run_config
from parity.training.runs import RunFolder
from parity.training.settings import TrainSettings, recipe

# The configuration dict of the notebook, unchanged.
NOTEBOOK = {
    "vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12, "n_layers": 12, "drop_rate": 0.1,
    "qkv_bias": False,
}  # fmt: skip


def test_notebook_dict_is_the_notebook_preset():
    assert as_config(NOTEBOOK) == PRESETS["notebook"]
    assert not as_config(NOTEBOOK).tied_head
    small = {**NOTEBOOK, "emb_dim": 24, "n_layers": 1, "vocab_size": 11}
    for package in (gpt_torch, gpt_jax):
        model = package.GPTModel(small)
        assert all(hasattr(model, name) for name in ("tok_emb", "pos_emb", "trf_blocks", "final_norm", "out_head"))


@pytest.mark.parametrize("name", ["124M", "355M", "774M", "1558M"])
def test_openai_presets(name):
    config = PRESETS[name]
    assert (config.n_ctx, config.n_vocab, config.qkv_bias, config.tied_head) == (1024, 50257, True, True)
    assert config.head_width == 64


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("125M", "unknown preset '125M'"),
        ({"n_embd": 770}, "not divisible"),
        ({"n_layer": 0}, "n_layer"),
        ({"n_layer": 2.0}, "n_layer"),
        ({"n_embd": 10**9, "n_head": 1}, "n_embd"),
        ({"drop_rate": 1.0}, "drop_rate"),
        ({"drop_rate": "0.1"}, r"drop_rate must be a number in \[0, 1\), got '0.1'"),
        ({"drop_rate": None}, "drop_rate must be a number .* got None"),
        ({"drop_rate": False}, "drop_rate must be a number .* got False"),
        ({"vocab_size": 5, "n_vocab": 7}, "vocab_size and n_vocab are the same; give one of them"),
        (None, "the name of a preset or a dict is needed, got None"),
        (3, "the name of a preset or a dict is needed, got 3"),
        ({"qkv_bias": "no"}, "qkv_bias"),
        ({"n_heads": 12, "heads": 3}, "heads"),
    ],
)
def test_bad_configs(config, message):
    for make in (as_config, gpt_torch.GPTModel, gpt_jax.GPTModel):
        with pytest.raises(InputError, match=message):
            make(config)


@pytest.mark.parametrize("as_array", [np.asarray, torch.tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_targets_that_count(as_array):
    targets = as_array([[0, 96, IGNORE_INDEX], [-100, 5, 5]])
    assert is_counted(targets).tolist() == [[True, True, False], [False, True, True]]
    TINY.check_targets(targets)
    for bad in (-2, -99, 97):
        with pytest.raises(InputError, match=rf"target {bad} is outside the vocabulary 0..96; mark positions"):
            TINY.check_targets(as_array([[0, bad], [IGNORE_INDEX, -100]]))


@pytest.mark.parametrize("bad", [{"steps": 0}, {"lr": 0.0}, {"warmup": -1}, {"batch_size": 10, "accumulate": 3}])
def test_bad_settings(bad):
    with pytest.raises(InputError, match=next(iter(bad))):
        TrainSettings(**bad)


def test_settings_of_presets():
    assert recipe("small").settings.corpus == "python-docs"
    assert recipe("124M").settings.batch_size == 480


def test_run_folders(tmp_path):
    run = RunFolder(tmp_path / "run")
    with pytest.raises(InputError, match="holds no run"):
        run.config()
    entries = run_config("tiny", TINY, recipe("tiny").settings, "abc")
    run.create(entries)
    assert run.update(entries) == []
    with pytest.raises(InputError, match="--resume"):
        run.create(entries)
    other = run_config("tiny", GPTConfig(n_layer=2), recipe("tiny").settings, "abd")
    with pytest.raises(InputError, match="corpus_sha256 was 'abc' and is now 'abd'") as caught:
        run.update(other)
    assert "model.n_layer was 3 and is now 2" in str(caught.value)
    changed = {**entries, "train": {**entries["train"], "keep": 7}}
    with pytest.raises(InputError, match=r"train.keep was 3 and is now 7"):
        run.update(changed)
    assert run.update(changed, ["train.keep"]) == ["train.keep was 3 and is now 7"]
    assert {key: value for key, value in run.config().items() if key != "id"} == changed
    run.config_file.write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        run.config()


def test_metrics_survive_a_cut_line(tmp_path):
    run = RunFolder(tmp_path)
    for step in range(4):
        run.log({"step": step})
    with run.metrics_file.open("a") as file:
        file.write('{"step": 4, "lo')
    assert RunFolder(tmp_path).metrics.last_step == 3
    run.forget_after(2)
    assert [json.loads(line)["step"] for line in run.metrics_file.read_text().splitlines()] == [0, 1, 2]


@pytest.mark.parametrize(
    ("package", "argument"),
    [
        *((package, {"attention": value}) for package in (gpt_torch, gpt_jax) for value in ("flash", "Explicit", None)),
        (gpt_torch, {"attention": "cudnn"}),  # the other backend's
        (gpt_jax, {"attention": "sdpa"}),
        *((gpt_jax, {"remat": value}) for value in ("dots", None)),
        *((gpt_jax, {"unroll": value}) for value in (0, 1.5)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_models_refuse_unknown_implementations(package, argument):
    [(name, value)] = argument.items()
    with pytest.raises(InputError, match=f"^{name} must be .*, got {value!r}"):
        package.GPTModel("tiny", **argument)


def test_fused_attention_refuses_dropout():
    model = gpt_jax.GPTModel(dataclasses.replace(TINY, drop_rate=0.1), seed=None, attention="cudnn")
    with pytest.raises(InputError, match='attention "cudnn" has no dropout'):
        model(jnp.ones((1, 4), jnp.int32), jax.random.key(0))
