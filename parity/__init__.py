"""What both backends share: configuration, weights, tokenizers, order of the data, sampling, training loop, comparison.

Nothing in this package imports torch, jax or tensorflow; its arrays are NumPy arrays.
"""

from typing import Any

from parity.config import PRESETS, GPTConfig, as_config
from parity.errors import InputError

__version__ = "0.1.0"

__all__ = ["PRESETS", "GPTConfig", "InputError", "as_config", "load_model_and_tokenizer", "load_tokenizer"]


def __getattr__(name: str) -> Any:
    """Import the loaders on first use, so that `import parity` loads the configuration only (PEP 562)."""
    if name == "load_tokenizer":
        from parity.data.tokenizer import load_tokenizer

        return load_tokenizer
    if name == "load_model_and_tokenizer":
        from parity.loading import load_model_and_tokenizer

        return load_model_and_tokenizer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
