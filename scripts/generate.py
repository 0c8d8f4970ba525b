"""Continue a prompt with a trained model, in either backend. The text is printed while it is generated.

python scripts/generate.py --run runs/NAME "The "
python scripts/generate.py --model 124M --backend torch "The meaning of life is"
python scripts/generate.py --model path/to/folder --file prompt.txt --samples 3
python scripts/generate.py --model 124M          # asks for prompts; from a pipe, the whole text is one
"""

import dataclasses
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from parity.cli import parse, read_text
from parity.data.tokenizer import Tokenizer, encode_prompt, stream_text
from parity.errors import InputError, exit_with_message, report_error
from parity.generation import prepare
from parity.loading import ModelArgs
from parity.sampling import GenerateOptions
from parity.streams import for_display


@dataclasses.dataclass(frozen=True)
class Args(ModelArgs):
    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = None
    """Text to continue. Without it and without --file, the script asks for prompts, or, if standard input is a pipe or
    file, reads one prompt from it."""
    file: Path | None = None
    """A UTF-8 file whose whole text is the prompt."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and of the computation."""
    max_new_tokens: int = 200
    """Largest number of tokens to generate per continuation."""
    temperature: float = 0.8
    """Sampling temperature: below 1 the most probable tokens become more probable; 0 always takes the most probable."""
    top_k: int | None = None
    """Number of most probable tokens to sample from. By default all tokens."""
    top_p: float | None = None
    """Sample from the fewest most probable tokens that together have this probability (0 to 1). By default all."""
    min_p: float | None = None
    """Sample from the tokens whose probability is at least this fraction (0 to 1) of that of the most probable token.
    By default all."""
    repetition_penalty: float | None = None
    """Factor by which tokens that are already in the text become less probable, if it is above 1 (Keskar et al. 2019).
    By default 1, which changes nothing."""
    stop: tuple[str, ...] = ()
    """Texts that end the continuation; they are compared as token sequences. By default none."""
    samples: int = 1
    """Number of continuations of the prompt."""
    seed: int = 0
    """Seed of the random numbers. The same seed gives the same text in both backends."""
    context_size: int | None = None
    """Largest number of tokens that the model attends to. By default the model's whole context."""
    overflow: Literal["crop", "stop"] = "crop"
    """What to do when the context is full: crop continues from its last tokens (slower), stop ends the text."""


def prompts(args: Args) -> Iterator[str]:
    if args.prompt is not None and args.file is not None:
        raise InputError("give the prompt or --file, not both")
    if args.prompt is not None:
        yield args.prompt
    elif args.file is not None:
        yield read_text(args.file, "--file")
    elif is_interactive(args):
        while True:
            try:
                yield input("prompt> ")
            except EOFError:
                return
            except UnicodeDecodeError:
                sys.stderr.write("error: the prompt is not UTF-8 text\n")
    else:
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")  # like --file, whatever the terminal's encoding
        try:
            yield sys.stdin.read()
        except UnicodeDecodeError:
            raise InputError("standard input is not UTF-8 text") from None


def is_interactive(args: Args) -> bool:
    """Whether prompts are asked for on the terminal."""
    return args.prompt is None and args.file is None and sys.stdin.isatty()


def generate_options(args: Args, tokenizer: Tokenizer) -> dict[str, Any]:
    """The options of generate() that the command line has, with the tokenizer's ids for texts."""
    names = GenerateOptions.__optional_keys__ - {"eos_id", "first_row", "per_prompt"}
    return {name: getattr(args, name) for name in names} | {
        "stop": [tokenizer.encode(text) for text in args.stop],
        "eos_id": tokenizer.eos_id,
    }


def write(text: str) -> None:
    sys.stdout.write(for_display(text, sys.stdout))


def continue_prompt(args: Args, backend: Any, model: Any, tokenizer: Tokenizer, prompt: str) -> None:
    """Print the continuations to standard output, and the speed to standard error."""
    ids = list(encode_prompt(tokenizer, prompt))
    options = generate_options(args, tokenizer)
    n_new = 0
    start = time.perf_counter()
    if args.samples == 1:
        steps = backend.stream(model, [ids], args.max_new_tokens, **options)

        def new_ids() -> Iterator[int]:
            nonlocal n_new
            for [token] in steps:
                n_new += 1
                if token != tokenizer.eos_id:
                    yield token

        write(prompt)
        for text in stream_text(tokenizer, new_ids()):
            write(text)
            sys.stdout.flush()
        write("\n")
    else:
        rows = backend.generate(model, [ids], args.max_new_tokens, **options)
        for number, row in enumerate(rows, 1):
            n_new += len(row) - len(ids)
            new = [token for token in row[len(ids) :] if token != tokenizer.eos_id]
            write(f"=== sample {number} ===\n{prompt}{''.join(stream_text(tokenizer, new))}\n")
        sys.stdout.flush()
    seconds = time.perf_counter() - start
    sys.stderr.write(f"[{n_new} tokens in {seconds:.1f} s, {n_new / seconds:.1f} tokens/s including compilation]\n")


def main() -> None:
    args = parse(Args, __doc__)
    backend, device_info, model, tokenizer, _ = args.load()
    sys.stderr.write(f"[{device_info}, {args.dtype}]\n")
    model = backend.cast(model, args.dtype)
    if args.backend == "jax":
        model = backend.for_decoding(model)
    # Bad options are refused before anybody types a prompt.
    options: Any = generate_options(args, tokenizer)
    prepare(model.config, [[tokenizer.eos_id]], args.max_new_tokens, options)
    for prompt in prompts(args):
        try:
            continue_prompt(args, backend, model, tokenizer, prompt)
        except InputError as error:  # such as a prompt that is longer than the context
            if not is_interactive(args):
                raise
            report_error(error)


if __name__ == "__main__":
    with exit_with_message():
        main()
