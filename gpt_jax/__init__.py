"""GPT-2 in Flax NNX, compiled by XLA. gpt_torch has the same functions for PyTorch."""

from gpt_jax.activations import run_with_cache, run_with_patches
from gpt_jax.classifier import add_classifier, classify, load_classifier, save_classifier
from gpt_jax.decoding import DecodingModel, for_decoding
from gpt_jax.generate import generate, generate_text_simple, stream
from gpt_jax.lora import add_lora, load_adapter, merge, save_adapter
from gpt_jax.model import GPTModel, cast
from gpt_jax.pretrained import load_pretrained, load_weights_into_gpt, save_pretrained
from gpt_jax.scoring import token_logprobs
from gpt_jax.weights import export_weights, load_weights

__all__ = [
    "DecodingModel",
    "GPTModel",
    "add_classifier",
    "add_lora",
    "cast",
    "classify",
    "export_weights",
    "for_decoding",
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
]
