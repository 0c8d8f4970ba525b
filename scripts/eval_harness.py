"""Evaluate a model with EleutherAI's lm-evaluation-harness, by the harness's own command line; needs the extra `eval`.

python scripts/eval_harness.py --model gpt-parity-jax --model_args model=124M --tasks lambada_openai --batch_size 16
python scripts/eval_harness.py --model gpt-parity-torch --model_args run=runs/NAME,checkpoint=best --tasks wikitext
python scripts/eval_harness.py ls tasks

The models are gpt-parity-jax and gpt-parity-torch. --model_args takes the options of scripts/generate.py that choose a
model: model or run, and checkpoint, adapter, vocab_bpe, dtype and compilation_cache. --device takes auto (the default),
cpu, gpu, cuda, tpu or mps. All other options are the harness's own.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping
from typing import Any, Literal

from parity.cli import parse, versions
from parity.data.tokenizer import Tokenizer
from parity.errors import InputError, exit_with_message
from parity.loading import ModelArgs

MODELS = {"gpt-parity-jax": "jax", "gpt-parity-torch": "torch"}
"""{name for --model: backend}"""


@dataclasses.dataclass(frozen=True)
class Args(ModelArgs):
    """What --model_args may give."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and of the computation."""


def parse_model_args(model_args: Mapping[str, Any], **given: str) -> Args:
    """Read --model_args, whose values the harness has made numbers and booleans where it can.

    Args:
        model_args: {name: value}.
        given: Other options of ModelArgs.

    Raises:
        InputError: For an argument that does not exist, and unless there is either a model or a run.
    """
    names = [field.name for field in dataclasses.fields(Args) if field.name not in ("backend", "device")]
    if unknown := sorted(set(model_args) - set(names)):
        raise InputError(f"--model_args: there is no {unknown[0]:.40}; choose from {', '.join(names)}")
    if ("run" in model_args) == ("model" in model_args):
        raise InputError("--model_args: give either model=SIZE (such as 124M, or a folder with weights) or run=FOLDER")
    options = []
    for name, value in {**model_args, **given}.items():
        option = name.replace("_", "-")
        options.append(f"--{'' if value else 'no-'}{option}" if isinstance(value, bool) else f"--{option}={value}")
    return parse(Args, None, args=options)


def load(backend: str, device: str | None, model_args: Mapping[str, Any]) -> tuple[Any, Any, Tokenizer]:
    """Load the model that --device and --model_args name.

    Returns:
        (package of the backend, GPTModel, tokenizer).

    Raises:
        InputError: As parse_model_args() and ModelArgs.load() do.
    """
    if device is None or not any(argument.startswith("--dev") for argument in sys.argv):
        device = "auto"  # where the harness's own default is cuda
    args = parse_model_args(model_args, backend=backend, device=device.removesuffix(":0"))
    package, device_info, model, tokenizer, folder = args.load()
    sys.stderr.write(f"[{device_info}, {args.dtype}, weights of {folder}]\n")
    return package, package.cast(model, args.dtype), tokenizer


def parse_batch_size(text: int | str) -> int | None:
    """Return the number that --batch_size gives; None for "auto" and "auto:N".

    Raises:
        InputError: For anything else.
    """
    if str(text).partition(":")[0] == "auto":
        return None
    if not str(text).isascii() or not str(text).isdecimal() or not 1 <= int(text) <= 2**16:
        raise InputError(f"--batch_size {text!s:.40}: give a number from 1 to 65536, or auto")
    return int(text)


@functools.cache  # the harness registers a name once
def constructor(backend: str) -> Any:
    """Return the class of a backend's models, which the harness constructs from its options."""
    from parity.evaluation.harness import HarnessModel  # here, because it needs the extra

    class Loaded(HarnessModel):
        def __init__(
            self,
            batch_size: int | str = 1,
            max_batch_size: int | None = None,  # of a search for the largest batch, which is not done
            device: str | None = None,
            **model_args: Any,
        ):
            size = parse_batch_size(batch_size)
            super().__init__(*load(backend, device, model_args), batch_size=size)

    return Loaded


def main() -> None:
    if "--version" in sys.argv[1:]:
        sys.stdout.write(f"{versions()}\n")
        raise SystemExit(0)
    if sys.argv[1:] in ([], ["-h"], ["--help"]):
        sys.stdout.write(f"{__doc__}\nThe option --version shows the installed versions.\n\n")
    from parity.evaluation.harness import run_command_line  # here, because it needs the extra

    run_command_line({name: constructor(backend) for name, backend in MODELS.items()})


if __name__ == "__main__":
    with exit_with_message():
        main()
