"""Continue a prompt with a trained model, by either backend.

python scripts/generate.py --run runs/NAME "The "
python scripts/generate.py --run runs/NAME --backend torch "The "
"""

import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Literal

import tyro

from parity import checkpoints
from parity.errors import exit_with_message
from parity.runs import RunFolder
from parity.tokenizer import encode_prompt, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Args:
    prompt: tyro.conf.Positional[str]
    """Text to continue."""
    run: Path
    """Run folder of train_jax.py; its newest intact checkpoint is used."""
    backend: Literal["jax", "torch"] = "jax"
    max_new_tokens: int | None = None
    """By default, up to 200 as far as the context holds."""
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe, for the gpt2 tokenizer."""


def main() -> None:
    args = tyro.cli(Args, description=__doc__)
    run = RunFolder(args.run)
    tokenizer = load_tokenizer(run.config()["train"]["tokenizer"], args.vocab_bpe)
    backend = importlib.import_module(f"gpt_{args.backend}")  # the other framework is never loaded
    model = backend.load_pretrained(checkpoints.newest_intact(run.checkpoints))
    prompt = list(encode_prompt(tokenizer, args.prompt))
    room = max(1, model.config.n_ctx - len(prompt))
    [row] = backend.generate(
        model,
        [prompt],
        max_new_tokens=min(200, room) if args.max_new_tokens is None else args.max_new_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        top_p=args.top_p,
        eos_id=tokenizer.eos_id,
        seed=args.seed,
    )
    sys.stdout.write(tokenizer.decode(row) + "\n")


if __name__ == "__main__":
    with exit_with_message():
        main()
