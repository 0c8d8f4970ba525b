"""Settings of tuning in addition to those of training, and the presets of scripts/finetune.py."""

import dataclasses
import math
from typing import Annotated, Any, Literal, get_args, get_type_hints

import tyro

from parity.config import PRESETS, GPTConfig
from parity.data.window_order import WindowOrder
from parity.errors import InputError, check_choice
from parity.training.objective import Reduction
from parity.training.settings import RECIPES, TrainSettings
from parity.tuning.embedded import EMBEDDED
from parity.tuning.encoding import LossOn
from parity.tuning.examples import Overlong
from parity.weights.adapters import LoraConfig
from parity.weights.classifier import Position

Task = Literal["instruct", "classify", "prefer"]
Template = Literal["plain", "alpaca"]
_TASKS_OF_OPTION: dict[str, tuple[Task, ...]] = {
    "template": ("instruct", "prefer"),
    "loss_on": ("instruct",),
    "packing": ("instruct",),
    "dpo_beta": ("prefer",),
    "dpo_logprobs": ("prefer",),
    "position": ("classify",),
    "head_bias": ("classify",),
    "balance": ("classify",),
    "train_blocks": ("classify",),
}
"""The options that not all tasks have."""


@dataclasses.dataclass(frozen=True)
class ExampleSettings(TrainSettings):
    """Settings of training as they apply to examples."""

    corpus: Annotated[str, tyro.conf.arg(name="data")] = EMBEDDED
    """Examples to train on: a .json, .jsonl or .parquet file, for labels also a .tsv file, or rules, a set that is made
    by rule."""
    validation_fraction: float = 0.05
    """Fraction of the examples whose loss is the validation loss: from the end of the file, or for labels at random."""
    steps: int = 300
    """Number of optimizer steps."""
    batch_size: int = 8
    """Number of examples per optimizer step."""
    accumulate: int | Literal["auto"] = 1
    """Number of micro-batches that the batch is divided into. Their gradients are summed, so more of them take less
    memory and do not change the result."""
    stride: tyro.conf.Suppress[int | None] = None
    """Not used: examples are not windows."""
    window_order: tyro.conf.Suppress[WindowOrder] = "shuffled"
    """Not used, as above."""
    sample_prompt: str = ""
    """Instruction that is answered at each evaluation; by default those of the first three examples for tests."""
    eval_prompts: str | None = None
    """Text file with one instruction per line; each evaluation answers all of them instead of the sample prompt."""
    sample_temperature: float = 0.0
    """Temperature of the samples at each evaluation; 0 always takes the most likely token."""


@dataclasses.dataclass(frozen=True)
class TuneSettings:
    """What a run learns from its examples.

    Raises:
        InputError: If a value is out of range.
    """

    task: Task = "instruct"
    """What to learn: responses to instructions (instruct), the labels of texts (classify), or which of two responses is
    preferred, with a reference (prefer)."""
    template: Template = "plain"
    """Text around an instruction: the headings of Alpaca (plain), or two sentences before them as well (alpaca)."""
    loss_on: LossOn = "response"
    """Tokens that count in the loss: those of the responses, or all tokens."""
    test_fraction: float = 0.1
    """Fraction of the examples that are held out to be answered or labeled: from the middle of the file, between those
    for training and those for validation, or for labels at random."""
    eval_items: int = 32
    """Number of examples for tests that each evaluation answers or labels, to count what is right."""
    max_length: int | None = None
    """Largest number of tokens of an example; by default the model's context."""
    packing: bool = False
    """Put several examples into each row, which then has --max-length positions. An example does not see the others in
    its row. --batch-size and --accumulate count rows."""
    overlong: Overlong = "cut"
    """What to do with an example that is longer: cut its end off, drop it, or refuse to train."""

    dpo_beta: float = 0.1
    """Only for the task prefer: how strongly the model is held to the reference, which is the initial model. A larger
    number allows it to move less far."""
    dpo_logprobs: Reduction = "sum"
    """Only for the task prefer: whether the log-probability of a response is the sum over its tokens, as in the paper,
    or their mean, as in the book."""
    position: Position = "last-token"
    """Only for the task classify: the position that the label is read from. It is that of the text's last token, or the
    last one after padding to the length of the longest text for training, as in the book."""
    head_bias: bool = False
    """Only for the task classify: whether the head has a bias, as the book's has. transformers' model has none."""
    balance: bool = False
    """Only for the task classify: use as many texts of each label as there are of the rarest, drawn at random."""
    train_blocks: int | None = None
    """Only for the task classify: the number of blocks, from the last one, that are trained beside the head, with the
    final norm; 0 trains the head alone. By default all parameters are trained."""

    lora_rank: int | None = None
    """Rank of LoRA adapters, which are then the only parameters that are trained; by default all are trained."""
    lora_alpha: float = 16.0
    """The output of an adapter is multiplied by alpha / rank."""
    lora_dropout: float = 0.0
    """Dropout probability of the adapters' inputs."""
    lora_targets: tuple[str, ...] = ("all",)
    """Linear layers with adapters: qkv, attn.out, mlp.in and mlp.out, all of these (all), or q, k and v one by one."""
    lora_rslora: bool = False
    """Multiply the output of an adapter by alpha / sqrt(rank) instead."""

    @property
    def lora(self) -> LoraConfig | None:
        """The options of the adapters, or None if all parameters are trained."""
        if self.lora_rank is None:
            return None
        return LoraConfig(self.lora_rank, self.lora_alpha, self.lora_dropout, self.lora_targets, self.lora_rslora)

    def __post_init__(self) -> None:
        if isinstance(self.lora_targets, list):  # as in JSON
            object.__setattr__(self, "lora_targets", tuple(self.lora_targets))
        _ = self.lora  # raises for options that are out of range
        hints = get_type_hints(TuneSettings)
        for name in ("task", "template", "loss_on", "overlong", "dpo_logprobs", "position"):
            check_choice(name, getattr(self, name), get_args(hints[name]))
        ranges = {"test_fraction": (0, 0.9), "eval_items": (0, 2**20), "max_length": (2, 2**24)}
        for name, (low, high) in {**ranges, "train_blocks": (0, 2**12)}.items():
            value: Any = getattr(self, name)
            if not (value is None and name in ("max_length", "train_blocks")) and not low <= value <= high:
                raise InputError(f"{name} must be between {low} and {high}, got {value!r:.60}")
        if not (isinstance(self.dpo_beta, int | float) and 0 < self.dpo_beta < math.inf):
            raise InputError(f"dpo_beta must be a positive number, got {self.dpo_beta!r:.60}")
        for field in dataclasses.fields(self):
            tasks, option = _TASKS_OF_OPTION.get(field.name, (self.task,)), f"--{field.name.replace('_', '-')}"
            is_given = getattr(self, field.name) != field.default
            if is_given and self.task not in tasks:
                raise InputError(f"{option} is for the task {' or '.join(tasks)}; leave it out")
            if is_given and field.name.startswith("lora_") and self.lora_rank is None:
                raise InputError(f"{option} is for adapters; give --lora-rank as well, or leave it out")
        if self.train_blocks is not None and self.lora_rank is not None:
            raise InputError("--train-blocks and --lora-rank exclude each other: adapters are on all blocks")


@dataclasses.dataclass(frozen=True)
class TuneRecipe:
    """Model and settings of a preset."""

    model: GPTConfig
    """The model of a run without --init-from."""
    settings: ExampleSettings
    tune: TuneSettings
    needs_weights: bool = True
    """Whether a run must have --init-from."""


_SETTINGS = ExampleSettings(
    steps=300, accumulate=1, lr=5e-5, min_lr=5e-6, warmup=20, beta2=0.99, dtype="float32", eval_every=50,
    sample_tokens=64,
)  # fmt: skip
_RULES_SETTINGS = dataclasses.replace(_SETTINGS, tokenizer="bytes", batch_size=16, eval_every=200, sample_tokens=16)
RULES = "rules"
OFFLINE: dict[Task, str] = {"instruct": RULES, "classify": "rules-classify", "prefer": "rules-prefer"}
"""The preset of a run without --data, for each task; with --data it is the task's name."""
TUNE_RECIPES: dict[str, TuneRecipe] = {
    # For two CPU cores and a small model of bytes.
    RULES: TuneRecipe(
        PRESETS["small"],
        dataclasses.replace(_RULES_SETTINGS, steps=800, lr=3e-3, min_lr=1e-4, warmup=50),
        TuneSettings(),
        needs_weights=False,
    ),
    "rules-classify": TuneRecipe(
        PRESETS["small"],
        dataclasses.replace(
            _RULES_SETTINGS, steps=200, lr=1e-3, min_lr=1e-4, eval_every=50, validation_fraction=0.1
        ),
        TuneSettings(task="classify", test_fraction=0.2, eval_items=256),
        needs_weights=False,
    ),
    "rules-prefer": TuneRecipe(
        PRESETS["small"],
        dataclasses.replace(_RULES_SETTINGS, steps=100, lr=5e-5, min_lr=5e-6, warmup=10, eval_every=25),
        TuneSettings(task="prefer"),
    ),
    "instruct": TuneRecipe(PRESETS["124M"], _SETTINGS, TuneSettings()),
    # Raschka, "Build a Large Language Model (From Scratch)", chapter 7: two epochs of 935 examples in batches of 8,
    # AdamW with torch's betas, no warm-up, no decay of the learning rate, no clipping; the loss is that of all tokens.
    "book-instruct": TuneRecipe(
        PRESETS["355M"],
        dataclasses.replace(
            _SETTINGS, steps=232, min_lr=5e-5, warmup=0, beta2=0.999, clip=1e9, seed=123, eval_every=29,
            sample_tokens=256,
        ),
        TuneSettings(template="alpaca", loss_on="all"),
    ),
    "classify": TuneRecipe(
        PRESETS["124M"],
        dataclasses.replace(_SETTINGS, validation_fraction=0.1),
        TuneSettings(task="classify", test_fraction=0.2, eval_items=256),
    ),
    # The same book, chapter 6: five epochs of 1,045 messages in batches of 8; the last block, the final norm and a head
    # with a bias are trained, and the label is read from the last position of messages that are padded alike.
    "book-spam": TuneRecipe(
        PRESETS["124M"],
        dataclasses.replace(
            _SETTINGS, steps=650, min_lr=5e-5, warmup=0, beta2=0.999, clip=1e9, seed=123, eval_every=130,
            validation_fraction=0.1,
        ),
        TuneSettings(
            task="classify", test_fraction=0.2, eval_items=300, position="last", head_bias=True, balance=True,
            train_blocks=1,
        ),
    ),
    "prefer": TuneRecipe(
        PRESETS["124M"], dataclasses.replace(_SETTINGS, steps=200, lr=5e-6, min_lr=5e-7), TuneSettings(task="prefer")
    ),
    # The same book's bonus material for chapter 7: one epoch of 935 pairs, with the model of book-instruct.
    "book-dpo": TuneRecipe(
        PRESETS["355M"],
        dataclasses.replace(
            _SETTINGS, steps=116, lr=5e-6, min_lr=5e-6, warmup=0, weight_decay=0.01, beta2=0.999, clip=1e9, seed=123,
            eval_every=29, sample_tokens=256,
        ),
        TuneSettings(task="prefer", template="alpaca", dpo_logprobs="mean"),
    ),
}  # fmt: skip


def tune_recipe(preset: str) -> TuneRecipe:
    """Return the recipe of a preset; raises InputError that lists the known presets if it is unknown."""
    if preset not in TUNE_RECIPES:
        training = "; it is one of the training scripts" if preset in RECIPES else ""
        raise InputError(f"unknown preset {preset!r}{training}; choose one of {', '.join(TUNE_RECIPES)}")
    return TUNE_RECIPES[preset]
