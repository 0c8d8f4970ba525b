"""GPT-2 in PyTorch. gpt_jax has the same functions for Flax."""

from gpt_torch.activations import run_with_cache, run_with_patches
from gpt_torch.classifier import add_classifier, classify, load_classifier, save_classifier
from gpt_torch.generate import generate, generate_text_simple, stream
from gpt_torch.lora import add_lora, load_adapter, merge, save_adapter
from gpt_torch.model import GPTModel, cast
from gpt_torch.pretrained import load_pretrained, load_weights_into_gpt, save_pretrained
from gpt_torch.scoring import token_logprobs
from gpt_torch.weights import export_weights, load_weights

__all__ = [
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
]
