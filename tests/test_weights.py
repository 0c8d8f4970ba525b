"""The table of parameters and the converter: names, shapes, orientation, round trips, initial weights."""

import dataclasses
import functools
import weakref

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from support.models import CONFIGS, TINY, probing_weights

import gpt_jax
import gpt_torch
from gpt_jax.weights import parameters
from parity import weights as table
from parity.arrays import aligned_empty, copy_into
from parity.config import PRESETS, GPTConfig
from parity.errors import InputError
from parity.weights.lazy import LazyTensor

PUBLISHED = {"124M": 124_439_808, "355M": 354_823_168, "774M": 774_030_080, "1558M": 1_557_611_200}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_parameter_counts(preset):
    """The table and both models agree with the published counts; nothing is allocated."""
    with torch.device("meta"):
        in_torch = sum(p.numel() for p in gpt_torch.GPTModel(preset, seed=None).parameters())
    abstract = jax.eval_shape(lambda: gpt_jax.GPTModel(preset, seed=None))
    in_jax = sum(leaf.size for leaf in jax.tree.leaves(abstract))
    assert table.n_params(PRESETS[preset]) == in_torch == in_jax == PUBLISHED[preset]


@pytest.mark.parametrize("preset", [*PRESETS])
def test_table_names_and_shapes_are_the_models(preset):
    config = PRESETS[preset]
    with torch.device("meta"):
        model = gpt_torch.GPTModel(config, seed=None)
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == table.shapes(config, "torch")
    abstract = nnx.eval_shape(lambda: gpt_jax.GPTModel(config, seed=None))
    assert {n: p.get_value().shape for n, p in parameters(abstract).items()} == table.shapes(config, "flax")


@pytest.mark.parametrize("source", table.FORMATS)
@pytest.mark.parametrize("target", table.FORMATS)
def test_round_trips_are_exact(source, target):
    original = probing_weights(TINY)
    in_source = dict(table.convert(original, "huggingface", source, TINY))
    in_target = dict(table.convert(in_source, source, target, TINY))
    assert {n: a.shape for n, a in in_target.items()} == table.shapes(TINY, target)
    back = dict(table.convert(in_target, target, "huggingface", TINY))
    assert back.keys() == original.keys()
    assert all(np.array_equal(back[name], original[name]) for name in original)


@pytest.mark.parametrize("source", table.FORMATS)
@pytest.mark.parametrize("target", table.FORMATS)
def test_conversion_reads_each_tensor_once_and_holds_one(source, target):
    arrays = dict(table.convert(probing_weights(TINY), "huggingface", source, TINY))
    read, sizes = {}, []

    def reader(name):
        assert name not in read
        assert not [n for n, array in read.items() if array() is not None]  # all others are released
        array = arrays[name].copy()
        read[name] = weakref.ref(array)
        return array

    lazy = {
        name: LazyTensor(name, array.shape, array.dtype, functools.partial(reader, name))
        for name, array in arrays.items()
    }
    for _, array in table.convert(lazy, source, target, TINY):
        sizes.append(array.size)
        del array
    assert read.keys() == arrays.keys()
    assert sizes[0] == max(sizes)


def test_models_give_back_what_they_were_given(config):
    weights = probing_weights(config, np.float32)
    for package in (gpt_torch, gpt_jax):
        model = package.GPTModel(config)
        package.load_weights(model, weights)
        out = package.export_weights(model)
        assert all(np.array_equal(out[name], weights[name]) for name in weights)
        with pytest.raises(InputError, match=r"missing wpe\.weight"):
            package.load_weights(model, {n: w for n, w in weights.items() if n != "wpe.weight"})


def test_head_order_by_probe():
    """Column (c, n, h) of OpenAI's c_attn becomes [c, n, h] in flax and row (c, n, h) in torch."""
    config = dataclasses.replace(TINY, n_layer=1)
    D, H = config.n_embd, config.head_width
    weights = {name: np.zeros(shape) for name, shape in table.shapes(config, "openai").items()}
    weights["model/h0/attn/c_attn/w"] = np.arange(3.0 * D * D).reshape(1, D, 3 * D)
    in_flax = dict(table.convert(weights, "openai", "flax", config))["trf_blocks.att.qkv_proj.kernel"]
    in_torch = dict(table.convert(weights, "openai", "torch", config))["trf_blocks.0.att.qkv_proj.weight"]
    for d, c, n, h in [(0, 0, 0, 1), (3, 1, 2, 4), (19, 2, 3, 0)]:
        want = weights["model/h0/attn/c_attn/w"][0, d, c * D + n * H + h]
        assert in_flax[0, d, c, n, h] == in_torch[c * D + n * H + h, d] == want


def test_square_matrices_are_oriented_by_the_table():
    config = dataclasses.replace(TINY, n_layer=1)
    weights = {name: np.zeros(shape) for name, shape in table.shapes(config, "openai").items()}
    weights["model/h0/attn/c_proj/w"][0, 2, 11] = 1.0
    converted = {target: dict(table.convert(weights, "openai", target, config)) for target in table.FORMATS}
    assert converted["huggingface"]["h.0.attn.c_proj.weight"][2, 11] == 1
    assert converted["torch"]["trf_blocks.0.att.out_proj.weight"][11, 2] == 1
    assert converted["flax"]["trf_blocks.att.out_proj.kernel"][0, 0, 2, 11] == 1


def test_all_problems_in_one_error():
    weights = probing_weights(TINY)
    del weights["h.1.ln_1.bias"]
    weights["h.9.extra"] = np.zeros(3)
    weights["wte.weight"] = weights["wte.weight"].T
    with pytest.raises(InputError) as caught:
        dict(table.convert(weights, "huggingface", "torch", TINY, origin="here.safetensors"))
    for text in ("here.safetensors", "missing h.1.ln_1.bias", "unknown h.9.extra [3]", "wte.weight has shape [20, 97]"):
        assert text in str(caught.value)


def test_openai_has_no_untied_head():
    with pytest.raises(InputError, match="no place for lm_head"):
        table.shapes(CONFIGS["notebook"], "openai")


def test_initial_weights():
    config = GPTConfig(n_vocab=500, n_ctx=200, n_embd=64, n_head=4, n_layer=8)
    weights = table.initial_weights(config, seed=1)
    assert weights["wte.weight"].std() == pytest.approx(0.02, rel=0.03)
    assert weights["wpe.weight"].std() == pytest.approx(0.01, rel=0.03)
    assert weights["h.3.mlp.c_proj.weight"].std() == pytest.approx(0.02 / 4, rel=0.03)
    assert (weights["h.3.ln_1.weight"] == 1).all()
    assert not weights["h.3.mlp.c_fc.bias"].any()
    assert not np.array_equal(weights["h.3.mlp.c_fc.weight"], weights["h.4.mlp.c_fc.weight"])
    again = table.initial_weights(dataclasses.replace(config, n_layer=8), seed=1)
    assert all(np.array_equal(again[name], weights[name]) for name in weights)


def test_large_arrays_are_copied_in_parts_to_aligned_memory():
    source = np.arange(3 * 2**20, dtype=np.float32).reshape(3, 1024, 1024)
    for array in (source, source.T, source[:, ::2]):
        copy = aligned_empty(array.shape, array.dtype)
        copy_into(copy, array)
        assert np.array_equal(copy, array)
        assert copy.ctypes.data % 64 == 0


@pytest.mark.parametrize("transposed", [False, True])
def test_values_that_are_not_finite_are_found_in_every_part(transposed):
    array = np.zeros((1536, 2048), np.float32)
    for place in (0, array.size // 2, array.size - 1):
        array.flat[place] = np.inf
        with pytest.warns(UserWarning, match="w has 1 values that are not finite"):
            table.warn_if_not_finite("w", array.T if transposed else array, "file")
        array.flat[place] = 0
    array[0, :] = np.finfo(np.float32).max  # finite, although a float32 sum overflows
    table.warn_if_not_finite("w", array, "file")


@pytest.mark.parametrize("package", [gpt_torch, gpt_jax])
def test_a_loaded_model_shares_no_memory_with_its_source(package, tmp_path):
    given = probing_weights(TINY, np.float32)
    model = package.GPTModel(TINY)
    package.load_weights(model, given)
    package.save_pretrained(model, tmp_path)
    content = (tmp_path / "model.safetensors").read_bytes()
    loaded = package.load_pretrained(tmp_path)
    before = {name: array.copy() for name, array in package.export_weights(loaded).items()}
    for array in given.values():
        array[...] = 7
    (tmp_path / "model.safetensors").write_bytes(bytes(len(content)))
    for current in (model, loaded):
        assert all(np.array_equal(array, before[name]) for name, array in package.export_weights(current).items())
