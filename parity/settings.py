"""How to train: the options that both trainers share, with defaults for each preset."""

import dataclasses
from typing import Literal

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
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """In which the model computes; parameters and optimizer are float32."""
    eval_every: int = 1000
    """Steps between evaluations, each with a sample and a checkpoint."""
    log_every: int = 10
    """Steps between reads of the loss from the device."""
    keep: int = 3
    """Newest checkpoints kept."""
    sample_prompt: str = "\n"
    """What the sample at each evaluation continues."""
    sample_tokens: int = 96
    seed: int = 0
    """Of the initial weights, the order of the data, dropout and samples."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "accumulate", "eval_every", "log_every", "keep", "sample_tokens"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "eps", "clip"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("min_lr", "warmup", "weight_decay", "seed"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.batch_size % self.accumulate:
            raise InputError(f"batch_size={self.batch_size} is not divisible by accumulate={self.accumulate}")


# nanoGPT's hyperparameters for the four sizes; the rest is for two CPU cores.
_CPU = TrainSettings(
    tokenizer="bytes", steps=600, batch_size=16, accumulate=1, lr=3e-3, min_lr=1e-4, warmup=60, beta2=0.99,
    dtype="float32", eval_every=100, sample_prompt="The ",
)  # fmt: skip
TRAIN_PRESETS: dict[str, TrainSettings] = {
    "small": _CPU,
    "tiny": dataclasses.replace(_CPU, steps=60, batch_size=8, warmup=5, eval_every=20, sample_tokens=16),
    "notebook": dataclasses.replace(
        _CPU, corpus="the-verdict", tokenizer="gpt2", steps=90, batch_size=2, lr=4e-4, min_lr=4e-4, warmup=1,
        eval_every=10, sample_prompt="Every effort moves you",
    ),
}  # fmt: skip


def settings_for(preset: str) -> TrainSettings:
    return TRAIN_PRESETS.get(preset, TrainSettings())
