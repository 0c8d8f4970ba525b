"""What both backends must agree on: configuration, weights, tokenizer, data order, noise, comparison.

Nothing in this package imports torch, jax or tensorflow; arrays are NumPy arrays.
"""

from parity.config import PRESETS, GPTConfig, as_config
from parity.errors import InputError

__version__ = "0.1.0"

__all__ = ["PRESETS", "GPTConfig", "InputError", "as_config"]
