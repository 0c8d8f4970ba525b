"""The functions of the notebook "GPT-2 from scratch" that need no framework, so that its code runs unchanged.

Those that need a framework are in gpt_torch/notebook.py and gpt_jax/notebook.py, and use the functions here. They
train as simply as the notebook does: a constant learning rate and no gradient clipping.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity import weights
from parity.config import GPTConfig, as_tied
from parity.data.tokenizer import END_OF_TEXT, load_tokenizer
from parity.data.window_order import order
from parity.errors import InputError
from parity.figures import new_figure


def download_and_load_gpt2(model_size: str, models_dir: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
    """Return one of OpenAI's models, in the notebook's nesting.

    Args:
        model_size: A size of `parity.config.SIZES`, such as "124M".
        models_dir: The files are read from models_dir/model_size, and downloaded to it if they are missing.

    Returns:
        (settings, params). settings is the content of hparams.json. params has wte, wpe, the final norm's g and b, and
        blocks: one {attn, mlp, ln_1, ln_2} per layer. Matrices are float32 [in, out].

    Raises:
        InputError: For an unknown size, a failed download or damaged files.
    """
    # Imported here because they import an HTTP client and a progress bar, which `import gpt_torch` should not load.
    from parity.weights import openai
    from parity.weights.openai_files import download_model

    folder = download_model(model_size, Path(models_dir) / model_size)
    config, tensors = openai.read(folder)
    return openai.hparams(config), nest(config, tensors)


def nest(config: GPTConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """Return weights in the notebook's nesting.

    Args:
        config: Configuration of the model.
        tensors: {OpenAI's name: tensor}; matrices are [1, in, out].

    Returns:
        The params of `download_and_load_gpt2`.
    """
    params: dict[str, Any] = {"blocks": [{} for _ in range(config.n_layer)]}
    for name, tensor in tensors.items():
        array = np.squeeze(np.asarray(tensor), axis=0) if name.endswith("/w") else np.asarray(tensor)
        first, *rest = name.removeprefix("model/").split("/")
        if first == "ln_f":
            place, rest = params, [rest[-1]]
        elif rest:
            place = params["blocks"][int(first.removeprefix("h"))]
        else:
            place, rest = params, [first]
        for part in rest[:-1]:
            place = place.setdefault(part, {})
        place[rest[-1]] = array
    return params


def flatten(params: dict[str, Any]) -> dict[str, np.ndarray]:
    """Return weights in the openai format; the inverse of `nest`.

    Args:
        params: Weights nested as `download_and_load_gpt2` returns them.

    Returns:
        {OpenAI's name: array} in the openai format.
    """
    flat = {f"model/{name}": params[name] for name in ("wte", "wpe") if name in params}
    flat |= {f"model/ln_f/{name}": params[name] for name in ("g", "b") if name in params}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        else:
            flat[prefix] = value[None] if prefix.endswith("/w") else value

    for layer, block in enumerate(params.get("blocks", [])):
        walk(f"model/h{layer}", block)
    return flat


def as_huggingface(params: dict[str, Any], config: GPTConfig) -> dict[str, np.ndarray]:
    """Return weights in the huggingface format.

    Args:
        params: Weights nested as `download_and_load_gpt2` returns them.
        config: Configuration of the model to load them into; an untied head becomes a copy of the embedding.

    Returns:
        {name: array} in the huggingface format.

    Raises:
        InputError: If the weights do not fit the configuration; the message lists the names.
    """
    arrays = dict(weights.convert(flatten(params), "openai", "huggingface", as_tied(config), origin="params"))
    if not config.tied_head:
        arrays["lm_head.weight"] = arrays["wte.weight"]
    return arrays


def _check_positive(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InputError(f"{name} must be at least 1, got {number}")


class GPTDatasetV1:
    """Windows over a text: item i is (inputs, targets), both int64 [T], with the targets one position later.

    Args:
        txt: The text.
        tokenizer: One of parity/data/tokenizer.py, or of tiktoken.
        max_length: Length T of a window, in tokens.
        stride: Distance between the starts of two windows, in tokens.

    Raises:
        InputError: For a text that is shorter than one window, and for a length or stride below 1.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int):
        _check_positive(max_length=max_length, stride=stride)
        ids = np.array(tokenizer.encode(txt, allowed_special={END_OF_TEXT}), np.int64)
        if len(ids) <= max_length:
            raise InputError(f"the text has {len(ids)} tokens, but a window needs max_length + 1 = {max_length + 1}")
        starts = range(0, len(ids) - max_length, stride)
        self.input_ids = np.stack([ids[start : start + max_length] for start in starts])  # [windows, T]
        self.target_ids = np.stack([ids[start + 1 : start + max_length + 1] for start in starts])  # [windows, T]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.input_ids[index], self.target_ids[index]


class DataLoader:
    """Batches of a dataset: each is (inputs [B, T], targets [B, T]).

    The order of an epoch depends only on the seed and on the number of epochs before it, so it is the same in both
    backends.

    Args:
        dataset: The windows.
        batch_size: Windows per batch, B.
        shuffle: Whether the order is random.
        drop_last: Whether the last batch of an epoch is left out if it is smaller than the others.
        seed: Seed of the order.
        convert: Turns an int64 NumPy array into an array of a framework.

    Raises:
        InputError: For a batch size below 1.
    """

    def __init__(
        self,
        dataset: GPTDatasetV1,
        batch_size: int,
        shuffle: bool,
        drop_last: bool,
        seed: int,
        convert: Callable[[np.ndarray], Any],
    ):
        _check_positive(batch_size=batch_size)
        self.dataset, self.batch_size, self.shuffle, self.drop_last = dataset, batch_size, shuffle, drop_last
        self.seed, self.epoch, self.convert = seed, 0, convert

    def __len__(self) -> int:
        batches = len(self.dataset) / self.batch_size
        return math.floor(batches) if self.drop_last else math.ceil(batches)

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        count = len(self.dataset)
        indices = order(self.seed, self.epoch, count) if self.shuffle else np.arange(count)
        self.epoch += 1
        for batch in range(len(self)):
            windows = indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.convert(self.dataset.input_ids[windows]), self.convert(self.dataset.target_ids[windows])


def create_dataloader(
    convert: Callable[[np.ndarray], Any],
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    seed: int = 0,
    tokenizer: Any = None,
) -> DataLoader:
    """Return batches of windows over a text; `create_dataloader_v1` of both backends.

    Args:
        convert: Turns an int64 NumPy array into an array of a framework.
        txt: The text.
        batch_size: Windows per batch.
        max_length: Length of a window, in tokens.
        stride: Distance between the starts of two windows, in tokens.
        shuffle: Whether the order of the windows is random.
        drop_last: Whether the last batch of an epoch is left out if it is smaller than the others.
        num_workers: Has no effect, as the windows are in memory; accepted so that the notebook's code runs unchanged.
        seed: Seed of the order.
        tokenizer: By default GPT-2's, with its vocabulary from the cache folder.

    Raises:
        InputError: For a text that is shorter than one window, and if the default tokenizer's vocabulary is missing.
    """
    dataset = GPTDatasetV1(txt, tokenizer or load_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, drop_last, seed, convert)


def mean_loss(
    calc_loss_batch: Callable[[Any, Any], float], data_loader: DataLoader, num_batches: int | None = None
) -> float:
    """Return the mean of the losses of several batches.

    Args:
        calc_loss_batch: (inputs, targets) -> the mean loss of a batch, in nats per token.
        data_loader: The batches.
        num_batches: Number of batches, from the first one; by default all.

    Returns:
        The mean over batches in nats per token; NaN for an empty loader.
    """
    count = len(data_loader) if num_batches is None else min(num_batches, len(data_loader))
    losses = [calc_loss_batch(*batch) for batch in itertools.islice(data_loader, count)]
    return sum(losses) / count if count else float("nan")


def train_loop(
    train_step: Callable[[int, Any, Any], None],
    evaluate: Callable[[], tuple[float, float]],
    print_sample: Callable[[], None],
    train_loader: DataLoader,
    num_epochs: int,
    eval_freq: int,
) -> tuple[list[float], list[float], list[int]]:
    """The loop of the notebook's `train_model_simple`, for both backends.

    Args:
        train_step: (step, inputs, targets) -> None; updates the model.
        evaluate: Returns (training loss, validation loss).
        print_sample: Called after each epoch.
        train_loader: Batches of the training text.
        num_epochs: Number of passes over `train_loader`.
        eval_freq: Steps between evaluations.

    Returns:
        (training losses, validation losses, tokens seen), one entry per evaluation; losses in nats per token.

    Raises:
        InputError: For an `eval_freq` below 1.
    """
    _check_positive(eval_freq=eval_freq)
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, step = 0, 0
    for epoch in range(num_epochs):
        for input_batch, target_batch in train_loader:
            train_step(step, input_batch, target_batch)
            tokens_seen += math.prod(input_batch.shape)
            if step % eval_freq == 0:
                train_loss, val_loss = evaluate()
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Step {step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
            step += 1
        print_sample()
    return train_losses, val_losses, track_tokens_seen


def encode_text(text: str, tokenizer: Any) -> np.ndarray:
    """Return the token ids of a text.

    Args:
        text: The text, in which `<|endoftext|>` is the special token.
        tokenizer: The tokenizer.

    Returns:
        Ids int64 [1, T].
    """
    return np.array([tokenizer.encode(text, allowed_special={END_OF_TEXT})], np.int64)


def token_ids_to_text(token_ids: Any, tokenizer: Any) -> str:
    """Return the text of token ids.

    Args:
        token_ids: Integer ids [1, T], an array of any framework.
        tokenizer: The tokenizer.
    """
    [row] = token_ids
    return tokenizer.decode(row.tolist())


def print_on_one_line(token_ids: Any, tokenizer: Any) -> None:
    """Print the text of token ids with spaces in place of line breaks.

    Args:
        token_ids: Integer ids [1, T], an array of any framework.
        tokenizer: The tokenizer.
    """
    print(token_ids_to_text(token_ids, tokenizer).replace("\n", " "))


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    path: str | Path = "loss-plot.pdf",
) -> Path:
    """Plot both losses by epoch, with the number of tokens seen as a second axis above.

    Args:
        epochs_seen: Epochs at each evaluation.
        tokens_seen: Tokens at each evaluation.
        train_losses: Training losses, in nats per token.
        val_losses: Validation losses, in nats per token.
        path: File to write; its suffix selects the format.

    Returns:
        The path.
    """
    figure = new_figure(figsize=(5, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(epochs_seen, train_losses, label="training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="validation loss")
    axes.set(xlabel="epochs", ylabel="loss (nats per token)")
    axes.legend()
    above = axes.twiny()
    above.plot(tokens_seen, train_losses, alpha=0)  # invisible, but sets the range of the axis
    above.set_xlabel("tokens seen")
    figure.savefig(path)
    return Path(path)
