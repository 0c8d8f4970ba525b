"""Training settings that both backends share, and the presets of the training scripts."""

import dataclasses
import math
import types
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from parity.config import PRESETS, GPTConfig
from parity.data.corpora import CORPORA, EMBEDDED
from parity.data.window_order import WindowOrder
from parity.errors import InputError


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Settings of a training run, which both backends share.

    Raises:
        InputError: If a value is out of range.
    """

    corpus: str = dataclasses.field(
        default=EMBEDDED,
        metadata={
            "help": f"Text to train on: {', '.join(CORPORA)}, a UTF-8 text file, a .bin token file, or a folder with "
            ".txt files, .bin token files or the output of scripts/prepare_data.py, which may also be at an address "
            "(s3://, gs://, https://): its shards are then fetched into the cache folder when they are needed."
        },
    )
    tokenizer: Literal["bytes", "gpt2"] = "gpt2"
    """Tokenizer of the corpus: bytes needs no file, gpt2 needs OpenAI's vocab.bpe."""
    validation_fraction: float = 0.1
    """Fraction of the corpus, taken from its end, that is held out for validation, unless it has validation files."""
    stride: int | None = None
    """Distance in tokens between the starts of two training windows; by default n_ctx, so that they do not overlap."""
    window_order: WindowOrder = "shuffled"
    """How the order of the windows in an epoch is made: shuffled shuffles a table of them, which takes 8 bytes per
    window in every process; keyed computes a permutation as it is needed, which takes no memory, for corpora of 10^11
    tokens and more. The two orders differ."""
    steps: int = 600_000
    """Number of optimizer steps."""
    batch_size: int = 480
    """Number of windows (sequences of n_ctx tokens) per optimizer step."""
    accumulate: int | Literal["auto"] = 40
    """Number of micro-batches that the batch is divided into. Their gradients are summed, so more of them take less
    memory and do not change the result. With auto, which is the default of train_jax.py on a GPU, the smallest number
    is taken whose compiled step fits the device's memory; elsewhere the default is the preset's number."""
    lr: float = 6e-4
    """Peak learning rate, reached at the end of the warm-up."""
    min_lr: float = 6e-5
    """Learning rate at the last step, where the cosine decay ends."""
    warmup: int = 2000
    """Number of steps in which the learning rate rises linearly to its peak."""
    weight_decay: float = 0.1
    """AdamW's weight decay of matrices and embeddings; biases and LayerNorm parameters are not decayed."""
    beta1: float = 0.9
    """AdamW's decay rate of the mean of the gradient."""
    beta2: float = 0.95
    """AdamW's decay rate of the mean of the squared gradient."""
    eps: float = 1e-8
    """AdamW's epsilon, which is added to the denominator of the update."""
    clip: float = 1.0
    """Largest norm of the gradient over all parameters; gradients with a larger norm are scaled down to it."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """Dtype of the computation. Parameters and optimizer state are float64 if it is float64, otherwise float32."""
    eval_every: int = 1000
    """Number of steps between evaluations; each evaluation also writes samples and a checkpoint."""
    log_every: int = 10
    """Number of steps between updates of the progress bar. The losses are read from the device only then and at
    evaluations, because reading waits for the device."""
    keep: int = 3
    """Number of newest checkpoints to keep; the one with the lowest validation loss is always kept."""
    keep_every: int | None = None
    """Also keep the checkpoints of all steps that are divisible by this number; by default none."""
    skip_nonfinite: int = 0
    """Number of steps that a run may skip because their loss or gradient is not finite; one more stops the run."""
    sample_prompt: str = "\n"
    """Prompt that is continued at each evaluation."""
    eval_prompts: str | None = None
    """Text file with one prompt per line; each evaluation continues all of them instead of the sample prompt."""
    sample_tokens: int = 96
    """Number of tokens to sample per prompt at each evaluation."""
    sample_temperature: float = 0.8
    """Temperature of the samples at each evaluation; 0 always takes the most likely token."""
    sample_top_k: int | None = 50
    """Number of most likely tokens that the samples are drawn from; None draws from the whole vocabulary."""
    init_scheme: Literal["gpt2", "torch"] = "gpt2"
    """Distribution of the initial weights: that of GPT-2, or the default of torch.nn's layers, as in the notebook."""
    seed: int = 0
    """Seed of the initial weights, the order of the data, dropout and the samples."""

    @property
    def param_dtype(self) -> str:
        """Dtype of the parameters and of the optimizer's state."""
        return "float64" if self.dtype == "float64" else "float32"

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(TrainSettings).items():
            value = getattr(self, name)
            if not _has_type(value, kind):
                raise InputError(f"{name} must be {_describe(kind)}, got {value!r:.80}")
            low, high = _RANGES.get(name, (-math.inf, math.inf))
            if isinstance(value, int | float) and not low <= value <= high:
                hint = "; a clip of 1e9 turns clipping off" if name == "clip" and value > high else ""
                raise InputError(f"{name} must be between {low} and {high}, got {value!r:.80}{hint}")
        if self.accumulate != "auto" and self.batch_size % self.accumulate:
            raise InputError(f"batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}")

    @property
    def micro_size(self) -> int:
        """Number of windows in a micro-batch.

        Raises:
            InputError: If `accumulate` is still "auto".
        """
        if self.accumulate == "auto":
            raise InputError("--accumulate auto works in train_jax.py on a GPU only; give a number")
        return self.batch_size // self.accumulate


# {setting: (smallest, largest value)}. The limits keep float32 arithmetic finite, alike in both backends: eps and clip
# do not become 0, 1 - beta keeps two digits, and steps are an int32 of the compiled step.
_RANGES: dict[str, tuple[float, float]] = {
    **dict.fromkeys(("steps", "eval_every", "log_every", "keep_every"), (1, 2**31 - 1)),
    **dict.fromkeys(("warmup", "skip_nonfinite"), (0, 2**31 - 1)),
    **dict.fromkeys(("keep", "stride", "sample_tokens", "sample_top_k"), (1, 2**24)),
    **dict.fromkeys(("batch_size", "accumulate"), (1, 2**20)),
    "validation_fraction": (1e-9, 1 - 1e-9),
    "lr": (1e-30, 1e38),
    "min_lr": (0, 1e38),
    "weight_decay": (0, 1e4),
    "beta1": (0, 0.99999),
    "beta2": (0, 0.99999),
    "eps": (1e-30, 1e9),
    "clip": (1e-30, 1e30),
    "sample_temperature": (0, 1e9),
    "seed": (0, 2**32 - 1),
}


def _has_type(value: Any, kind: Any) -> bool:
    """Whether a value, which may come from a config.json, has the type of its field; an int is a float as well."""
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in get_args(kind)
    if get_origin(kind) in (Union, types.UnionType):
        return any(_has_type(value, part) for part in get_args(kind))
    return isinstance(value, int | float if kind is float else kind) and not isinstance(value, bool)


def _describe(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(get_args(kind)) if len(get_args(kind)) > 1 else str(get_args(kind)[0])
    if get_origin(kind) in (Union, types.UnionType):
        return " or ".join(_describe(part) for part in get_args(kind))
    return {int: "an integer", float: "a number", str: "text", types.NoneType: "nothing"}[kind]


# Settings that a resumed run may change: they affect what is kept and shown, but not the losses. The corpus may have
# moved; its sha256 may not differ.
CHANGEABLE = (
    "log_every", "keep", "keep_every", "skip_nonfinite", "sample_prompt", "eval_prompts", "sample_tokens",
    "sample_temperature", "sample_top_k", "corpus",
)  # fmt: skip
CHANGEABLE_KEYS = frozenset(f"train.{name}" for name in CHANGEABLE)
"""The same as keys of config.json."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Model and settings of a preset of the training scripts."""

    model: GPTConfig
    settings: TrainSettings
    remat: Literal["none", "products", "all"] = "none"
    """What gpt_jax recomputes in the backward pass instead of keeping it in memory, on a CPU."""
    unroll: int = 1
    """Number of layers per iteration of gpt_jax's scan, on a CPU. See docs/results/performance.md."""

    def program(self, n_layer: int, platform: str) -> tuple[int, Literal["none", "products", "all"]]:
        """Return (unroll, remat) for a model with `n_layer` layers on a platform, by JAX's name of it.

        On GPUs nothing is recomputed and all layers are written out, in each size: both are faster, and take less
        memory than a loop that copies activations into stacked arrays. See docs/results/gpu-program.md.
        """
        return (n_layer, "none") if platform == "gpu" else (min(self.unroll, n_layer), self.remat)


# For two CPU cores.
_CPU = TrainSettings(
    tokenizer="bytes", steps=600, batch_size=16, accumulate=1, lr=3e-3, min_lr=1e-4, warmup=60, beta2=0.99,
    dtype="float32", eval_every=100, sample_prompt="The ",
)  # fmt: skip
# nanoGPT's two runs on the characters of tiny-shakespeare (config/train_shakespeare_char.py and its README). The
# text is ASCII, so its bytes are its characters.
_SHAKESPEARE = dataclasses.replace(
    _CPU, corpus="tiny-shakespeare", steps=2000, batch_size=12, lr=1e-3, min_lr=1e-4, warmup=100, eval_every=250,
    sample_prompt="\n",
)  # fmt: skip
FINE_TUNING = "fine-tuning"
"""The preset of runs that start from existing weights, unless another one is given."""
_BYTES = GPTConfig(n_vocab=257)
RECIPES: dict[str, Recipe] = {
    # nanoGPT's config/train_gpt2.py: 491,520 tokens per step on OpenWebText; the larger sizes use the same settings.
    "124M": Recipe(PRESETS["124M"], TrainSettings(), unroll=12),
    "355M": Recipe(PRESETS["355M"], TrainSettings()),
    "774M": Recipe(PRESETS["774M"], TrainSettings()),
    "1558M": Recipe(PRESETS["1558M"], TrainSettings(), remat="products"),
    "124M-openwebtext": Recipe(PRESETS["124M"], TrainSettings(), unroll=12),
    # llm.c's scripts/run_gpt2_124M.sh: 524,288 tokens per step, decay to zero, 10 billion tokens of FineWeb-Edu.
    "124M-fineweb-edu": Recipe(
        PRESETS["124M"],
        TrainSettings(steps=19_073, batch_size=512, accumulate=8, min_lr=0.0, warmup=700, eval_every=250),
        unroll=12,
    ),
    "shakespeare-char": Recipe(
        dataclasses.replace(_BYTES, n_ctx=256, n_embd=384, n_head=6, n_layer=6, drop_rate=0.2),
        dataclasses.replace(_SHAKESPEARE, steps=5000, batch_size=64, dtype="bfloat16"),
    ),
    "shakespeare-char-cpu": Recipe(  # twice nanoGPT's learning rate: 1.82 nats per token instead of 1.89
        dataclasses.replace(_BYTES, n_ctx=64, n_embd=128, n_head=4, n_layer=4),
        dataclasses.replace(_SHAKESPEARE, lr=2e-3),
        remat="products",
    ),
    "small": Recipe(PRESETS["small"], _CPU, remat="products"),
    "tiny": Recipe(
        PRESETS["tiny"],
        dataclasses.replace(_CPU, steps=60, batch_size=8, warmup=5, eval_every=20, sample_tokens=16),
    ),
    # The model and the tokenizer are those of --init-from.
    FINE_TUNING: Recipe(
        PRESETS["124M"],
        dataclasses.replace(
            _CPU, tokenizer="gpt2", steps=500, batch_size=8, lr=3e-5, min_lr=3e-6, warmup=50, eval_every=50,
            sample_prompt="\n",
        ),
    ),
    "notebook": Recipe(
        PRESETS["notebook"],
        dataclasses.replace(
            _CPU, corpus="the-verdict", tokenizer="gpt2", steps=90, batch_size=2, lr=4e-4, min_lr=4e-4, warmup=1,
            beta2=0.999, eval_every=9, sample_prompt="Every effort moves you", init_scheme="torch",
        ),
    ),
}  # fmt: skip


def recipe(preset: str) -> Recipe:
    """Return the recipe of a preset; raises InputError that lists the known presets if it is unknown."""
    if preset not in RECIPES:
        raise InputError(f"unknown preset {preset!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[preset]
