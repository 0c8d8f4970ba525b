"""The notebook's own functions that need no framework, so that its code runs unchanged."""

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from parity.config import GPTConfig
from parity.data.tokenizer import END_OF_TEXT, load_tokenizer
from parity.data.windows import order
from parity.errors import InputError
from parity.weights import openai
from parity.weights.openai_files import download_model


def download_and_load_gpt2(model_size: str, models_dir: str | Path) -> tuple[dict[str, int], dict[str, Any]]:
    """(settings, params): hparams.json, and the weights nested as the notebook nests them.

    params has wte, wpe, the final norm's g and b, and blocks: a list of {attn, mlp, ln_1, ln_2}. Matrices
    are float32 [in, out]. Files are downloaded into models_dir/model_size where they are missing.
    """
    folder = download_model(model_size, Path(models_dir) / model_size)
    config, tensors = openai.read(folder)
    return openai.hparams(config), nest(config, tensors)


def nest(config: GPTConfig, tensors: dict[str, Any]) -> dict[str, Any]:
    """The notebook's nesting of {OpenAI's name: tensor}."""
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
    """{OpenAI's name: array} of the notebook's nesting."""
    named = {f"model/{name}": params[name] for name in ("wte", "wpe") if name in params}
    named |= {f"model/ln_f/{name}": params[name] for name in ("g", "b") if name in params}

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}/{key}", inner)
        else:
            named[prefix] = value[None] if prefix.endswith("/w") else value

    for layer, block in enumerate(params.get("blocks", [])):
        walk(f"model/h{layer}", block)
    return named


class GPTDatasetV1:
    """Shifted windows over a text: item i is (inputs [T], targets [T]), int64, the targets one position on.

    `tokenizer`: one of ours or of tiktoken's. Raises InputError for a text shorter than one window.
    """

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int):
        ids = np.array(tokenizer.encode(txt, allowed_special={END_OF_TEXT}), np.int64)
        if len(ids) <= max_length:
            raise InputError(f"the text has {len(ids)} tokens, a window takes max_length + 1 = {max_length + 1}")
        starts = range(0, len(ids) - max_length, stride)
        self.input_ids = np.stack([ids[start : start + max_length] for start in starts])  # [windows, T]
        self.target_ids = np.stack([ids[start + 1 : start + max_length + 1] for start in starts])  # [windows, T]

    def __len__(self) -> int:
        return len(self.input_ids)

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return self.input_ids[index], self.target_ids[index]


class DataLoader:
    """Batches of a data set, (inputs [B, T], targets [B, T]), made arrays of a framework by `convert`.

    The order of an epoch is a function of the seed and of how many epochs came before, and the same in both
    backends.
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
            chosen = indices[batch * self.batch_size : (batch + 1) * self.batch_size]
            yield self.convert(self.dataset.input_ids[chosen]), self.convert(self.dataset.target_ids[chosen])


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
    """The notebook's create_dataloader_v1, for both backends.

    `tokenizer`: by default GPT-2's, from the cache folder. `num_workers` is accepted and changes nothing: the
    windows are in memory.
    """
    dataset = GPTDatasetV1(txt, tokenizer or load_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, drop_last, seed, convert)


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[int],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
    path: str | Path = "loss-plot.pdf",
) -> Path:
    """Picture of both losses by epoch, with the tokens seen on a second axis above; where it was saved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(epochs_seen, train_losses, label="training loss")
    axes.plot(epochs_seen, val_losses, linestyle="-.", label="validation loss")
    axes.set(xlabel="epochs", ylabel="loss (nats a token)")
    axes.legend()
    above = axes.twiny()
    above.plot(tokens_seen, train_losses, alpha=0)  # gives the axis its range
    above.set_xlabel("tokens seen")
    figure.savefig(path)
    plt.close(figure)
    return Path(path)
