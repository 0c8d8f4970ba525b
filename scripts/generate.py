"""Continue a prompt with a trained model, by either backend; text appears as it is made.

python scripts/generate.py --run runs/NAME "The "
python scripts/generate.py --model 124M --backend torch "The meaning of life is"
python scripts/generate.py --model path/to/folder --file prompt.txt --samples 3
python scripts/generate.py --model 124M          # asks for prompts; or reads one from a pipe
"""

import dataclasses
import importlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import tyro

from parity import loading as sources
from parity.cli import parse
from parity.data.tokenizer import Tokenizer, encode_prompt, stream_text
from parity.errors import InputError, exit_with_message


@dataclasses.dataclass(frozen=True)
class Args:
    prompt: tyro.conf.Positional[str | None] = None
    """Text to continue; without it and --file, lines of standard input."""
    file: Path | None = None
    """A file whose text is the prompt."""
    run: Path | None = None
    """Run folder of a training script."""
    checkpoint: str = "newest"
    """Of the run: newest (intact), best (by validation loss), or a step."""
    model: str | None = None
    """124M, 355M, 774M, 1558M, or a folder with weights."""
    backend: Literal["jax", "torch"] = "jax"
    dtype: Literal["float32", "bfloat16"] = "float32"
    max_new_tokens: int = 200
    temperature: float = 0.8
    """0 is greedy."""
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    stop: tuple[str, ...] = ()
    """Texts that end the continuation, compared as tokens."""
    samples: int = 1
    seed: int = 0
    overflow: Literal["crop", "stop"] = "crop"
    """Past the model's context: go on from the last tokens, computed anew for each, or stop."""
    vocab_bpe: Path | None = None
    """OpenAI's vocab.bpe, for the gpt2 tokenizer."""


def prompts(args: Args) -> Iterator[str]:
    if args.prompt is not None and args.file is not None:
        raise InputError("give the prompt or --file, not both")
    if args.prompt is not None:
        yield args.prompt
    elif args.file is not None:
        try:
            yield args.file.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            raise InputError(f"--file {args.file} is not UTF-8 text") from None
    elif sys.stdin.isatty():
        while True:
            try:
                yield input("prompt> ")
            except EOFError:
                return
    else:
        yield sys.stdin.read()


def show(args: Args, backend: Any, model: Any, tokenizer: Tokenizer, prompt: str) -> None:
    """Print the continuations; the speed goes to standard error."""
    ids = list(encode_prompt(tokenizer, prompt))
    options = {
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "min_p": args.min_p,
        "repetition_penalty": args.repetition_penalty,
        "stop": [tokenizer.encode(text) for text in args.stop],
        "eos_id": tokenizer.eos_id,
        "seed": args.seed,
        "overflow": args.overflow,
    }
    counted = 0
    begin = time.perf_counter()
    if args.samples == 1:
        steps = backend.stream(model, [ids], args.max_new_tokens, **options)

        def new_ids() -> Iterator[int]:
            nonlocal counted
            for [token] in steps:
                counted += 1
                if token != tokenizer.eos_id:
                    yield token

        sys.stdout.write(prompt)
        for text in stream_text(tokenizer, new_ids()):
            sys.stdout.write(text)
            sys.stdout.flush()
        sys.stdout.write("\n")
    else:
        rows = backend.generate(model, [ids], args.max_new_tokens, samples=args.samples, **options)
        for number, row in enumerate(rows, 1):
            counted += len(row) - len(ids)
            new = [token for token in row[len(ids) :] if token != tokenizer.eos_id]
            sys.stdout.write(f"=== sample {number} ===\n{prompt}{tokenizer.decode(new)}\n")
    seconds = time.perf_counter() - begin
    sys.stderr.write(f"[{counted} tokens in {seconds:.1f} s, {counted / seconds:.1f} tokens/s, compilation included]\n")


def main() -> None:
    args = parse(Args, __doc__)
    backend = importlib.import_module(f"gpt_{args.backend}")  # the other framework is never loaded
    model, tokenizer, _ = sources.load(backend, args.run, args.model, args.vocab_bpe, args.checkpoint)
    model = backend.cast(model, args.dtype)
    if args.backend == "jax":
        model = backend.for_decoding(model)
    for prompt in prompts(args):
        show(args, backend, model, tokenizer, prompt)


if __name__ == "__main__":
    with exit_with_message():
        main()
