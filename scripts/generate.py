"""Continue a prompt with a trained model, in either backend. The text is printed while it is generated.

python scripts/generate.py --run runs/NAME "The "
python scripts/generate.py --model 124M --backend torch "The meaning of life is"
python scripts/generate.py --model path/to/folder --file prompt.txt --samples 3
python scripts/generate.py --model 124M          # asks for prompts; from a pipe, the whole text is one
python scripts/generate.py --model 124M --prompts prompts.jsonl --out out.jsonl   # many prompts, in batches
python scripts/generate.py --model 124M --prompts prompts.jsonl --out out.jsonl --part 0/4
"""

import contextlib
import dataclasses
import functools
import io
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from parity.cli import parse, read_text
from parity.console import PlainConsole, TaskProgress
from parity.data.tokenizer import Tokenizer, encode_prompt, stream_text
from parity.errors import InputError, exit_with_message, report_error
from parity.evaluation.weights import model_sha256
from parity.generation import prepare
from parity.loading import Loaded, ModelArgs
from parity.parts import Part, parse_part
from parity.prompt_files.output import Output, output_path
from parity.prompt_files.prompts import BadLine, PromptFile
from parity.prompt_files.run import Plan, continuations
from parity.sampling import GenerateOptions
from parity.streams import for_display


@dataclasses.dataclass(frozen=True)
class Args(ModelArgs):
    prompt: Annotated[str | None, tyro.conf.Positional, tyro.conf.arg(metavar="[PROMPT]")] = None
    """Text to continue. Without it and without --file, the script asks for prompts, or, if standard input is a pipe or
    file, reads one prompt from it."""
    file: Path | None = None
    """A UTF-8 file whose whole text is the prompt."""
    prompts: Path | None = None
    """A file with a prompt per line. If its name ends in .jsonl or .ndjson, each line is a JSON object with a prompt (a
    text) or tokens (a list of ids), and an id and a seed if desired; otherwise each line is a text. Needs --out."""
    out: Path | None = None
    """With --prompts, the .jsonl file for the continuations, one line per prompt, in the order of the prompts. Started
    again with the same options, the script goes on where it was stopped."""
    part: str | None = None
    """With --prompts, k/n generates only part k of n parts, where k counts from 0, and writes OUT-k-of-n.jsonl. Parts
    may run at the same time; concatenated in order, they are the file that one process writes. By default all."""
    batch_size: int | None = None
    """With --prompts, the number of continuations that are generated at once. By default 32."""
    skip_bad: bool = False
    """With --prompts, go on if a line holds no prompt for the model; its line in --out then says why. By default the
    first such line is an error, before anything is generated."""
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


def check(args: Args) -> Part:
    """Return the part of the work to do; raise InputError for options that exclude each other."""
    if args.prompt is not None and args.file is not None:
        raise InputError("give the prompt or --file, not both")
    if args.prompts is None:
        given: dict[str, Any] = {"--out": args.out, "--part": args.part, "--skip-bad": args.skip_bad or None}
        given["--batch-size"] = args.batch_size
        if unused := [name for name, value in given.items() if value is not None]:
            raise InputError(f"{unused[0]} needs --prompts, a file with a prompt per line")
    else:
        if args.prompt is not None or args.file is not None:
            raise InputError("--prompts replaces the prompt and --file; give one of them")
        if args.out is None:
            raise InputError("--prompts needs --out, the .jsonl file for the continuations")
    return Part(0, 1) if args.part is None else parse_part(args.part)


def prompts(args: Args) -> Iterator[str]:
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


def continue_prompts(args: Args, file: PromptFile, part: Part, loaded: Loaded, sha256: str) -> None:
    """Write the continuations of the prompts of a file into --out.

    Args:
        args: The options of the script.
        file: The file.
        part: Which part of its prompts.
        loaded: The model, and what belongs to it.
        sha256: The sha256 of the model's weights.
    """
    assert args.out is not None
    path = output_path(args.out, part if args.part is not None else None)
    batch_size = 32 if args.batch_size is None else args.batch_size
    plan = Plan.of(file.n_prompts, batch_size, args.samples)
    tokenizer = loaded.tokenizer
    prompts = file.encode(plan.prompts_of(part), tokenizer, loaded.model.config, args.context_size)
    options = generate_options(args, tokenizer)
    settings = {
        "prompts_sha256": file.sha256,
        "weights_sha256": sha256,
        "tokenizer": tokenizer.name,
        "backend": args.backend,
        "dtype": args.dtype,
        "batch_size": batch_size,
        "part": str(part),
        "max_new_tokens": args.max_new_tokens,
        **options,
    }
    bad = [line for line in prompts if isinstance(line, BadLine)]
    for line in bad[:10]:
        sys.stderr.write(f"warning: --prompts {file.path}, line {line.id} {line.reason}\n")
    start = time.perf_counter()
    n_prompts = n_new = 0
    with contextlib.closing(Output(path, settings, [prompt.id for prompt in prompts])) as out:
        n_before = out.n_done - out.n_done % plan.block_size  # an incomplete block is generated again
        if out.n_done:
            sys.stderr.write(f"[{out.n_done:,} of {len(prompts):,} prompts are in {path} already]\n")
        with TaskProgress(PlainConsole(stderr=True, lossy=True), "generating", "prompts") as progress:

            def show(more_prompts: int, more_tokens: int) -> None:
                nonlocal n_prompts, n_new
                n_prompts, n_new = n_prompts + more_prompts, n_new + more_tokens
                progress.show(n_before + n_prompts, len(prompts), n_prompts, n_new)

            generate = functools.partial(loaded.backend.generate, loaded.model)
            n_most = args.max_new_tokens
            for records in continuations(generate, tokenizer, prompts, plan, out.n_done, n_most, options, show):
                out.add(records)
    seconds = time.perf_counter() - start
    sys.stderr.write(f"[{n_prompts:,} prompts, {n_new:,} tokens in {seconds:.1f} s, {n_new / seconds:.1f} tokens/s ")
    sys.stderr.write(f"including compilation{f'; {len(bad):,} bad lines' if bad else ''}]\n")


def main() -> None:
    args = parse(Args, __doc__)
    part = check(args)
    file = None if args.prompts is None else PromptFile(args.prompts, args.skip_bad)
    loaded = args.load()
    backend, device_info, model, tokenizer, folder = loaded
    sys.stderr.write(f"[{device_info}, {args.dtype}]\n")
    sha256 = "" if file is None else model_sha256(backend, model, folder, args.adapter)
    model = backend.cast(model, args.dtype)
    if args.backend == "jax":
        model = backend.for_decoding(model)
    # Bad options are refused before anybody types a prompt.
    options: Any = generate_options(args, tokenizer)
    prepare(model.config, [[tokenizer.eos_id]], args.max_new_tokens, options)
    if file is not None:
        continue_prompts(args, file, part, loaded._replace(model=model), sha256)
        return
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
