"""The public interface: which names it has, that they are documented, and that both backends offer the same."""

import inspect
from pathlib import Path

import pytest

import gpt_jax
import gpt_torch
import parity

ROOT = Path(__file__).parents[1]
COMMON = {
    "GPTModel",
    "add_classifier",
    "add_lora",
    "cast",
    "classify",
    "export_weights",
    "generate",
    "generate_text_simple",
    "load_adapter",
    "load_classifier",
    "load_pretrained",
    "load_weights",
    "load_weights_into_gpt",
    "merge",
    "run_with_cache",
    "run_with_patches",
    "save_adapter",
    "save_classifier",
    "save_pretrained",
    "stream",
    "token_logprobs",
}
NAMES = {
    parity: {"PRESETS", "GPTConfig", "InputError", "as_config", "load_model_and_tokenizer", "load_tokenizer"},
    gpt_torch: COMMON,
    gpt_jax: COMMON | {"DecodingModel", "for_decoding"},
}
# Parameters that have no meaning in PyTorch: layers per compiled loop, steps per call, and random keys of Flax.
JAX_ONLY = {"GPTModel": {"unroll", "remat"}, "stream": {"every"}}
MODULES = sorted(path for package in NAMES for path in Path(package.__file__).parent.rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").rglob("*.py"))


@pytest.mark.parametrize("package", NAMES, ids=lambda package: package.__name__)
def test_names(package):
    assert set(package.__all__) == NAMES[package]
    assert len(package.__all__) == len(set(package.__all__))
    for name in package.__all__:
        assert hasattr(package, name)


@pytest.mark.parametrize("package", NAMES, ids=lambda package: package.__name__)
def test_every_name_has_a_docstring(package):
    for name in package.__all__:
        value = getattr(package, name)
        if callable(value):
            assert value.__doc__, name
            assert not value.__doc__.startswith(f"{name}("), f"{name}: a signature that dataclasses generated"


@pytest.mark.parametrize("name", sorted(COMMON))
def test_both_backends_have_the_same_signature(name):
    described = []
    for backend in (gpt_torch, gpt_jax):
        function = getattr(backend, name)
        function = function.__init__ if inspect.isclass(function) else function  # flax.nnx hides the signature
        parameters = inspect.signature(function).parameters.values()
        described.append([(p.name, p.kind, p.default) for p in parameters if p.name not in JAX_ONLY.get(name, ())])
    assert described[0] == described[1]


@pytest.mark.parametrize("path", MODULES + SCRIPTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_are_short_and_documented(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 300
    assert text.startswith('"""')
