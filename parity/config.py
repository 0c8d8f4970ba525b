"""Configuration of a GPT-2, and the axis legend that every file of the project follows.

Axis legend, the same letters in comments, einsums, the weight table and sharding rules:

    B batch            T query positions    S key positions     P n_ctx, rows of pos_emb
    D model width      N heads              H head width        C 3: query, key, value
    F MLP width (4 D)  V vocabulary         L layers

`x # [B, T, D]` says that x has these axes, in this order.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from parity.errors import InputError

# openai/gpt-2 src/model.py, `norm`; torch's default is the same, Flax's is 1e-6.
LAYER_NORM_EPS = 1e-5

IGNORE_INDEX = -1
"""Target of a padded position: it counts in no loss."""

# The notebook's configuration keys -> ours.
NOTEBOOK_NAMES = {
    "vocab_size": "n_vocab",
    "context_length": "n_ctx",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
_LIMITS = {"n_vocab": 2**24, "n_ctx": 2**20, "n_embd": 2**16, "n_head": 2**12, "n_layer": 2**12}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape and options of one model; the size names are those of OpenAI's hparams.json.

    Raises InputError for a size that is not a positive integer, for n_embd not divisible by
    n_head, and for a drop_rate outside [0, 1).
    """

    n_vocab: int = 50257
    n_ctx: int = 1024
    n_embd: int = 768
    n_head: int = 12
    n_layer: int = 12
    drop_rate: float = 0.0
    """Dropout after the embeddings, on the attention pattern and on each residual branch."""
    qkv_bias: bool = True
    """Whether query, key and value have a bias; GPT-2 does, the notebook's own model does not."""
    tied_head: bool = True
    """Whether out_head is tok_emb, as in GPT-2, or a matrix of its own, as in the notebook."""

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise InputError(f"config: {name} must be an integer in 1..{limit}, got {value!r}")
        if self.n_embd % self.n_head:
            raise InputError(
                f"config: n_embd={self.n_embd} is not divisible by n_head={self.n_head}; every head has the same width"
            )
        if not 0.0 <= self.drop_rate < 1.0:
            raise InputError(f"config: drop_rate must be in [0, 1), got {self.drop_rate!r}")
        for name in ("qkv_bias", "tied_head"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"config: {name} must be true or false, got {getattr(self, name)!r}")

    @property
    def head_width(self) -> int:
        return self.n_embd // self.n_head

    @property
    def axes(self) -> dict[str, int]:
        """Size of each axis of the legend that the configuration fixes."""
        return {
            "V": self.n_vocab,
            "P": self.n_ctx,
            "D": self.n_embd,
            "C": 3,
            "N": self.n_head,
            "H": self.head_width,
            "F": 4 * self.n_embd,
            "L": self.n_layer,
        }

    def check_tokens(self, shape: tuple[int, ...], low: int = 0, high: int = 0) -> None:
        """Raise InputError unless tokens of `shape` [B, T], with ids low..high, fit the model."""
        if len(shape) != 2:
            raise InputError(f"tokens must have axes [B, T], got shape {list(shape)}")
        if 0 in shape:
            raise InputError(f"tokens are empty: shape {list(shape)}")
        if shape[1] > self.n_ctx:
            raise InputError(f"{shape[1]} tokens are more than the model's context, n_ctx={self.n_ctx}; shorten them")
        if low < 0 or high >= self.n_vocab:
            bad = low if low < 0 else high
            raise InputError(
                f"token id {bad} is outside the vocabulary 0..{self.n_vocab - 1}; was the text encoded for this model?"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


PRESETS: dict[str, GPTConfig] = {
    "124M": GPTConfig(),
    "355M": GPTConfig(n_embd=1024, n_head=16, n_layer=24),
    "774M": GPTConfig(n_embd=1280, n_head=20, n_layer=36),
    "1558M": GPTConfig(n_embd=1600, n_head=25, n_layer=48),
    # The notebook's from-scratch model: a short context, a head of its own, no q/k/v bias.
    "notebook": GPTConfig(n_ctx=256, drop_rate=0.1, qkv_bias=False, tied_head=False),
    # What `make train` trains on two CPU cores.
    "small": GPTConfig(n_vocab=257, n_ctx=128, n_embd=128, n_head=4, n_layer=4),
    # For tests: every axis has another size, so that no two can be confused.
    "tiny": GPTConfig(n_vocab=97, n_ctx=24, n_embd=20, n_head=4, n_layer=3),
}


def as_config(config: "GPTConfig | Mapping[str, Any] | str") -> GPTConfig:
    """A GPTConfig from a preset's name, from a dict in our or the notebook's names, or as it is.

    A dict in the notebook's names describes the notebook's model, so its head is untied unless
    `tied_head` says otherwise. Raises InputError for an unknown preset or key.
    """
    if isinstance(config, GPTConfig):
        return config
    if isinstance(config, str):
        if config not in PRESETS:
            raise InputError(f"unknown preset {config!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[config]
    renamed = {NOTEBOOK_NAMES.get(key, key): value for key, value in config.items()}
    if NOTEBOOK_NAMES.keys() & config.keys():
        renamed.setdefault("tied_head", False)
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(renamed.keys() - known):
        raise InputError(f"config: unknown keys {unknown}; known are {sorted(known)}")
    return GPTConfig(**renamed)


def as_tied(config: GPTConfig) -> GPTConfig:
    """The same model with out_head tied to tok_emb."""
    return dataclasses.replace(config, tied_head=True)
