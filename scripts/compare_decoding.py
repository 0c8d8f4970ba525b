"""Compare decoding strategies on one set of prompts, and write a table, a picture and a Markdown report.

python scripts/compare_decoding.py --run runs/NAME
python scripts/compare_decoding.py --model 124M --prompts prompts.txt --out reports/decoding
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import track
from rich.table import Table

from parity.cli import parse
from parity.console import PlainConsole
from parity.data.tokenizer import encode_prompt, stream_text
from parity.errors import exit_with_message
from parity.figures import new_figure
from parity.loading import ModelArgs
from parity.prompt_files.prompts import Prompt, PromptFile

STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "greedy, repetition penalty 1.2": {"temperature": 0.0, "repetition_penalty": 1.2},
    "temperature 0.7": {"temperature": 0.7},
    "temperature 1.0": {"temperature": 1.0},
    "temperature 1.3": {"temperature": 1.3},
    "top-k 40": {"temperature": 1.0, "top_k": 40},
    "top-p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "min-p 0.05": {"temperature": 1.0, "min_p": 0.05},
}
PROMPTS: tuple[str, ...] = ("The ", "In the beginning", "def ", "A list is")
MEASURES = {
    "mean log-probability": "mean log-probability (nats) that the model gives to the chosen tokens",
    "distinct-1": "distinct tokens divided by all tokens of a continuation, averaged over continuations",
    "distinct-2": "distinct pairs of tokens divided by all pairs of a continuation, averaged over those with a pair",
    "repetition": "fraction of sequences of four tokens that occurred earlier in a continuation, averaged over "
    "continuations with such a sequence",
}


@dataclasses.dataclass(frozen=True)
class Args(ModelArgs):
    prompts: Path | None = None
    """A file with a prompt per line, as for generate.py: texts or, in a .jsonl file, JSON objects, optionally with
    seeds. By default a few short prompts."""
    max_new_tokens: int = 100
    """Largest number of tokens per continuation."""
    samples: int = 4
    """Number of continuations of each prompt; greedy decoding has one."""
    seed: int = 0
    """Seed of the random numbers."""
    out: Path = Path("reports/decoding")
    """Folder for decoding.md, decoding.png and decoding.json."""


def measure(new: list[list[int]], logprobs: list[list[float]]) -> dict[str, float | None]:
    """The MEASURES of continuations; distinct-n as in Li et al. 2016. None if no continuation has n tokens."""

    def grams(row: list[int], n: int) -> list[tuple[int, ...]]:
        return [tuple(row[i : i + n]) for i in range(len(row) - n + 1)]

    def distinct(n: int) -> float | None:
        # For each row by itself: over more rows together, fewer n-grams are distinct.
        ratios = [len(set(grams(row, n))) / len(grams(row, n)) for row in new if len(row) >= n]
        return float(np.mean(ratios)) if ratios else None

    distinct_4 = distinct(4)
    values = (
        float(np.mean([value for row in logprobs for value in row])),
        distinct(1),
        distinct(2),
        None if distinct_4 is None else 1 - distinct_4,
    )
    return dict(zip(MEASURES, values, strict=True))


def main() -> None:
    args = parse(Args, __doc__)
    file = None if args.prompts is None else PromptFile(args.prompts)
    backend, device_info, model, tokenizer, folder = args.load()
    prompts = [Prompt(0, np.array(encode_prompt(tokenizer, text), np.int32)) for text in PROMPTS]
    if file is not None:
        lines = file.encode(range(file.n_prompts), tokenizer, model.config)
        prompts = [line for line in lines if isinstance(line, Prompt)]  # all of them: a bad line is an error
    ids = [prompt.tokens.tolist() for prompt in prompts]
    texts = tuple(tokenizer.decode(tokens) for tokens in ids)
    figures, examples = {}, {}
    for name, options in track(
        STRATEGIES.items(), "generating", transient=True, console=PlainConsole(stderr=True, lossy=True)
    ):
        samples = 1 if options["temperature"] == 0 else args.samples
        rows, logprobs = backend.generate(
            model,
            ids,
            args.max_new_tokens,
            samples=samples,
            seed=args.seed,
            eos_id=tokenizer.eos_id,
            per_prompt=[{"seed": prompt.seed} for prompt in prompts],
            return_logprobs=True,
            **options,
        )
        new = [row[len(ids[number // samples]) :] for number, row in enumerate(rows)]
        figures[name] = measure(new, logprobs)
        examples[name] = "".join(stream_text(tokenizer, (token for token in new[0] if token != tokenizer.eos_id)))
    report(args, f"{folder}, {args.backend} on {device_info}", texts, figures, examples)


def show(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.3f}"


def report(args: Args, origin: str, texts: tuple[str, ...], figures: dict, examples: dict) -> None:
    table = Table("strategy", *MEASURES)
    for name, values in figures.items():
        table.add_row(name, *map(show, values.values()))
    console = PlainConsole()
    console.print(table)

    args.out.mkdir(parents=True, exist_ok=True)
    figure = new_figure(figsize=(13, 3.2), layout="constrained")
    axes = figure.subplots(1, len(MEASURES), sharey=True)
    for axis, name in zip(axes, MEASURES, strict=True):
        axis.barh(list(figures), [math.nan if values[name] is None else values[name] for values in figures.values()])
        axis.set_title(name, fontsize=10)
    axes[0].invert_yaxis()
    figure.savefig(args.out / "decoding.png", dpi=120)

    lines = [
        "# Decoding strategies",
        "",
        f"{origin}, {len(texts)} prompts, up to {args.max_new_tokens} new tokens, seed {args.seed}.",
        "",
        "| strategy | " + " | ".join(MEASURES) + " |",
        "|---" * (len(MEASURES) + 1) + "|",
        *(f"| {name} | " + " | ".join(map(show, values.values())) + " |" for name, values in figures.items()),
        "",
        *(f"- {name}: {meaning}" for name, meaning in MEASURES.items()),
        "",
        "![measures of each strategy](decoding.png)",
        "",
        f"## First continuation of {texts[0]!r}",
    ]
    for name, text in examples.items():
        lines += ["", f"**{name}**", "", *("    " + line for line in text.splitlines())]
    (args.out / "decoding.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    (args.out / "decoding.json").write_text(json.dumps(figures, indent=2) + "\n")
    console.print(f"Wrote decoding.md, decoding.png and decoding.json to {args.out}/", soft_wrap=True)


if __name__ == "__main__":
    with exit_with_message():
        main()
