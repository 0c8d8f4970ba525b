"""How to train: the options that both trainers share, and the presets of the training scripts."""

import dataclasses
from typing import Literal

from parity.config import PRESETS, GPTConfig
from parity.errors import InputError


@dataclasses.dataclass(frozen=True)
class TrainSettings:
    """Options of a training run. Raises InputError for values out of range."""

    corpus: str = "python-docs"
    """python-docs, the-verdict, tiny-shakespeare, a text file, or a folder of .txt or .bin files."""
    tokenizer: Literal["bytes", "gpt2"] = "gpt2"
    """bytes needs no file; gpt2 needs OpenAI's vocab.bpe."""
    validation_part: float = 0.1
    """Part at the end that is for validation, where the corpus does not say."""
    stride: int | None = None
    """From the start of one training window to the next; by default the context, so that none overlap."""
    steps: int = 600_000
    """Optimizer steps."""
    batch_size: int = 480
    """Windows in an optimizer step."""
    accumulate: int = 40
    """Micro-batches that a step is cut into; their gradients add up to the whole batch's."""
    lr: float = 6e-4
    """Peak learning rate."""
    min_lr: float = 6e-5
    """Learning rate at the last step."""
    warmup: int = 2000
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """AdamW's decay of matrices and embeddings; biases and LayerNorm have none."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    clip: float = 1.0
    """Largest global norm of the gradient."""
    dtype: Literal["float32", "bfloat16", "float64"] = "bfloat16"
    """In which the model computes; parameters and optimizer are float32, or float64 with it."""
    eval_every: int = 1000
    """Steps between evaluations, each with samples and a checkpoint."""
    log_every: int = 10
    """Steps between reads of the loss from the device."""
    keep: int = 3
    """Newest checkpoints kept; the one with the lowest validation loss always is."""
    keep_every: int | None = None
    """Checkpoints of steps divisible by it are kept for good."""
    skip_nonfinite: int = 0
    """Steps of a run whose loss or gradient is not finite that are passed over; one more stops it."""
    sample_prompt: str = "\n"
    """What the sample at each evaluation continues."""
    eval_prompts: str | None = None
    """A text file with prompts, one a line, to continue at each evaluation in place of sample_prompt."""
    sample_tokens: int = 96
    initial: Literal["gpt2", "torch"] = "gpt2"
    """How initial weights are drawn: as GPT-2's, or as torch.nn's layers do it, as in the notebook."""
    seed: int = 0
    """Of the initial weights, the order of the data, dropout and samples."""

    def __post_init__(self) -> None:
        counts = ("steps", "batch_size", "accumulate", "eval_every", "log_every", "keep", "keep_every", "sample_tokens")
        for name in counts:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "eps", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("min_lr", "warmup", "weight_decay", "skip_nonfinite", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}")


# Settings that a resumed run may change: they touch what is kept and shown, not the path of the losses.
CHANGEABLE = ("log_every", "keep", "keep_every", "skip_nonfinite", "sample_prompt", "eval_prompts", "sample_tokens")


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a preset of the training scripts stands for."""

    model: GPTConfig
    settings: TrainSettings
    remat: Literal["none", "products", "all"] = "none"
    """Of gpt_jax: what a gradient computes again instead of keeping it."""
    unroll: int = 1
    """Of gpt_jax: layers written out in the compiled program. Defaults: see docs/results/performance.md."""


# For two CPU cores.
_CPU = TrainSettings(
    tokenizer="bytes", steps=600, batch_size=16, accumulate=1, lr=3e-3, min_lr=1e-4, warmup=60, beta2=0.99,
    dtype="float32", eval_every=100, sample_prompt="The ",
)  # fmt: skip
# nanoGPT's two runs on characters of tiny-shakespeare, config/train_shakespeare_char.py and its README; the
# text is ASCII, so its bytes are its characters.
_SHAKESPEARE = dataclasses.replace(
    _CPU, corpus="tiny-shakespeare", steps=2000, batch_size=12, lr=1e-3, min_lr=1e-4, warmup=100, eval_every=250,
    sample_prompt="\n",
)  # fmt: skip
_BYTES = GPTConfig(n_vocab=257)
RECIPES: dict[str, Recipe] = {
    # nanoGPT's config/train_gpt2.py: 491,520 tokens a step on OpenWebText; so for every size.
    "124M": Recipe(PRESETS["124M"], TrainSettings(), unroll=12),
    "355M": Recipe(PRESETS["355M"], TrainSettings()),
    "774M": Recipe(PRESETS["774M"], TrainSettings()),
    "1558M": Recipe(PRESETS["1558M"], TrainSettings(), remat="products"),  # else its 12 windows take 70 GB
    "124M-openwebtext": Recipe(PRESETS["124M"], TrainSettings(), unroll=12),
    # llm.c's scripts/run_gpt2_124M.sh: 524,288 tokens a step, decay to zero, 10 billion tokens of FineWeb-Edu.
    "124M-fineweb-edu": Recipe(
        PRESETS["124M"],
        TrainSettings(steps=19_073, batch_size=512, accumulate=8, min_lr=0.0, warmup=700, eval_every=250),
        unroll=12,
    ),
    "shakespeare-char": Recipe(
        dataclasses.replace(_BYTES, n_ctx=256, n_embd=384, n_head=6, n_layer=6, drop_rate=0.2),
        dataclasses.replace(_SHAKESPEARE, steps=5000, batch_size=64, dtype="bfloat16"),
    ),
    "shakespeare-char-cpu": Recipe(  # with twice nanoGPT's learning rate: 1.82 nats instead of 1.89
        dataclasses.replace(_BYTES, n_ctx=64, n_embd=128, n_head=4, n_layer=4),
        dataclasses.replace(_SHAKESPEARE, lr=2e-3),
        remat="products",
    ),
    "small": Recipe(PRESETS["small"], _CPU, remat="products"),
    "tiny": Recipe(
        PRESETS["tiny"],
        dataclasses.replace(_CPU, steps=60, batch_size=8, warmup=5, eval_every=20, sample_tokens=16),
    ),
    "notebook": Recipe(
        PRESETS["notebook"],
        dataclasses.replace(
            _CPU, corpus="the-verdict", tokenizer="gpt2", steps=90, batch_size=2, lr=4e-4, min_lr=4e-4, warmup=1,
            beta2=0.999, eval_every=9, sample_prompt="Every effort moves you", initial="torch",
        ),
    ),
}  # fmt: skip


def recipe(preset: str) -> Recipe:
    """Raises InputError, listing them, for a preset that is none."""
    if preset not in RECIPES:
        raise InputError(f"unknown preset {preset!r}; choose one of {', '.join(RECIPES)}")
    return RECIPES[preset]
