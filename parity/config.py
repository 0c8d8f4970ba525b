"""Configuration of a GPT-2 model, and the axis letters that every file of the project uses.

Comments, einsums, the weight table and the sharding rules all use the same letters:

    B batch            T query positions    S key positions     P n_ctx, rows of pos_emb
    D model width      N heads              H head width        C 3: query, key, value
    F MLP width (4 D)  V vocabulary         L layers            R rank of an adapter
    Y labels of a classifier

`x # [B, T, D]` means that x has these axes, in this order.
"""

import dataclasses
import numbers
from collections.abc import Mapping
from typing import Any, Literal, get_args

from parity.errors import InputError

LAYER_NORM_EPS = 1e-5
"""Added to the variance in LayerNorm (openai/gpt-2 src/model.py, `norm`). PyTorch has the same default, Flax 1e-6."""

IGNORE_INDEX = -1
"""Target of a position that does not count in the loss, such as padding. PyTorch's default, -100, is ignored too."""

_IGNORED_TARGETS = (IGNORE_INDEX, -100)

NOTEBOOK_NAMES = {
    "vocab_size": "n_vocab",
    "context_length": "n_ctx",
    "emb_dim": "n_embd",
    "n_heads": "n_head",
    "n_layers": "n_layer",
}
"""{key of the notebook's configuration dict: field of GPTConfig}."""

_LIMITS = {"n_vocab": 2**24, "n_ctx": 2**20, "n_embd": 2**16, "n_head": 2**12, "n_layer": 2**12}


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """Shape and options of a model. The names of the sizes are those of OpenAI's hparams.json.

    Raises:
        InputError: For a size that is not a positive integer, for n_embd not divisible by n_head, and for a
            drop_rate outside [0, 1).
    """

    n_vocab: int = 50257
    """Number of tokens in the vocabulary: the tokenizer's, or more, for example 50257 padded to 50304."""
    n_ctx: int = 1024
    """Length of the context: the largest number of tokens that the model can attend to."""
    n_embd: int = 768
    """Width of the embeddings and of the residual stream; must be a multiple of n_head."""
    n_head: int = 12
    """Number of attention heads per layer."""
    n_layer: int = 12
    """Number of transformer layers."""
    drop_rate: float = 0.0
    """Dropout probability, applied to the embeddings, the attention pattern and the output of each residual branch."""
    qkv_bias: bool = True
    """Whether the query, key and value projections have a bias. GPT-2 has one; the notebook's own model has none."""
    tied_head: bool = True
    """Whether the output head shares its matrix with the token embedding, as in GPT-2, or has its own."""
    eos_id: int | None = dataclasses.field(default=None, compare=False, repr=False)
    """Id of the end-of-text token that config.json states for other programs, where it is not the tokenizer's. It is
    not part of the function that the model computes, so it is ignored when configurations are compared."""

    def __post_init__(self) -> None:
        for name, limit in _LIMITS.items():
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= limit:
                raise InputError(f"config: {name} must be an integer in 1..{limit}, got {value!r}")
        if self.n_embd % self.n_head:
            raise InputError(
                f"config: n_embd={self.n_embd} is not divisible by n_head={self.n_head}; every head has the same width"
            )
        is_number = isinstance(self.drop_rate, numbers.Real) and not isinstance(self.drop_rate, bool)
        if not is_number or not 0.0 <= self.drop_rate < 1.0:
            raise InputError(f"config: drop_rate must be a number in [0, 1), got {self.drop_rate!r}")
        for name in ("qkv_bias", "tied_head"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"config: {name} must be true or false, got {getattr(self, name)!r}")
        if self.eos_id is not None and (type(self.eos_id) is not int or not 0 <= self.eos_id < self.n_vocab):
            raise InputError(f"config: eos_id must be an integer in 0..{self.n_vocab - 1}, got {self.eos_id!r}")

    @property
    def head_width(self) -> int:
        """Width of one attention head, axis H."""
        return self.n_embd // self.n_head

    @property
    def axes(self) -> dict[str, int]:
        """{axis letter: size} of the axes whose size the configuration determines."""
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
        """Check token ids before they enter the model.

        Args:
            shape: Shape of the ids, which must be [B, T].
            low: Smallest id.
            high: Largest id.

        Raises:
            InputError: If there are not two axes, no tokens, T above n_ctx, or an id outside the vocabulary.
        """
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

    def check_targets(self, targets: Any) -> None:
        """Check the targets of a loss.

        Args:
            targets: Integers of any shape: an array of NumPy, PyTorch or JAX, which must not be traced.

        Raises:
            InputError: For a target that is neither in the vocabulary nor ignored (-1 or -100).
        """
        wrong = targets[is_counted(targets) & ((targets < 0) | (targets >= self.n_vocab))]
        if len(wrong):
            raise InputError(
                f"target {int(wrong[0])} is outside the vocabulary 0..{self.n_vocab - 1}; "
                f"mark positions to leave out with {IGNORE_INDEX} (or -100)"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return {field: value}, which `GPTConfig(**fields)` accepts; without eos_id if it is None."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name != "eos_id" or value is not None}


def is_counted(targets: Any) -> Any:
    """Return which targets count in the loss.

    Args:
        targets: Integers of any shape: an array of NumPy, PyTorch or JAX, which may be traced.

    Returns:
        Booleans of the same shape, false where a target is -1 or -100.
    """
    first, second = _IGNORED_TARGETS
    return (targets != first) & (targets != second)


Size = Literal["124M", "355M", "774M", "1558M"]
"""Type of a name in SIZES."""

SIZES: tuple[Size, ...] = get_args(Size)
"""The models that OpenAI published, by their number of parameters."""

PRESETS: dict[str, GPTConfig] = {
    "124M": GPTConfig(),
    "355M": GPTConfig(n_embd=1024, n_head=16, n_layer=24),
    "774M": GPTConfig(n_embd=1280, n_head=20, n_layer=36),
    "1558M": GPTConfig(n_embd=1600, n_head=25, n_layer=48),
    # The model that the notebook trains from scratch: a short context, an untied head, no q/k/v bias.
    "notebook": GPTConfig(n_ctx=256, drop_rate=0.1, qkv_bias=False, tied_head=False),
    # The model that `make train` trains on two CPU cores.
    "small": GPTConfig(n_vocab=257, n_ctx=128, n_embd=128, n_head=4, n_layer=4),
    # For tests. No two axes have the same size, so that they cannot be confused.
    "tiny": GPTConfig(n_vocab=97, n_ctx=24, n_embd=20, n_head=4, n_layer=3),
}
"""Configurations by name: those of SIZES, and small ones."""


def as_config(config: "GPTConfig | Mapping[str, Any] | str") -> GPTConfig:
    """Return a GPTConfig for a configuration in any of the accepted forms.

    Args:
        config: A GPTConfig, the name of a preset, or a dict with the keys of GPTConfig or of the notebook. A dict with
            the notebook's keys describes the notebook's model, so its head is untied unless it contains `tied_head`.

    Raises:
        InputError: For an unknown preset or key, and for invalid values.
    """
    if isinstance(config, GPTConfig):
        return config
    if isinstance(config, str):
        if config not in PRESETS:
            raise InputError(f"unknown preset {config!r}; choose one of {', '.join(PRESETS)}")
        return PRESETS[config]
    if not isinstance(config, Mapping):
        raise InputError(f"config: a GPTConfig, the name of a preset or a dict is needed, got {config!r:.60}")
    if twice := [f"{key} and {name}" for key, name in NOTEBOOK_NAMES.items() if {key, name} <= config.keys()]:
        raise InputError(f"config: {twice[0]} are the same; give one of them")
    renamed = {NOTEBOOK_NAMES.get(key, key): value for key, value in config.items()}
    if NOTEBOOK_NAMES.keys() & config.keys():
        renamed.setdefault("tied_head", False)
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown := sorted(renamed.keys() - known, key=str):
        raise InputError(f"config: unknown keys {unknown}; known are {sorted(known)}")
    return GPTConfig(**renamed)


def as_tied(config: GPTConfig) -> GPTConfig:
    """Return the same configuration with the head tied to the token embedding.

    Args:
        config: Configuration of the model.
    """
    return dataclasses.replace(config, tied_head=True)
