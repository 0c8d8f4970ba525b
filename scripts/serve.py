"""Serve a model on this machine: a page in the browser, and OpenAI's completions API for other programs.

python scripts/serve.py --run runs/NAME
python scripts/serve.py --model 124M --backend jax --port 8000

The address is printed once the server answers. Ctrl-C or SIGTERM lets all accepted requests finish, and then stops the
server.
"""

import dataclasses
import importlib
import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from parity.cli import parse
from parity.errors import InputError, exit_with_message, printable
from parity.loading import ModelArgs

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Addresses that only programs on this machine reach."""


@dataclasses.dataclass(frozen=True)
class Args(ModelArgs):
    backend: Annotated[Literal["jax", "torch", "both"] | None, tyro.conf.arg(metavar="jax|torch|both")] = None  # type: ignore[assignment]
    """Framework that runs the model. With both, each of them serves it, as two models; this is the default where
    both are installed."""
    host: str = "127.0.0.1"
    """Address to listen on. By default only programs on this machine reach it; otherwise give an API key too."""
    port: int = 8000
    """Port to listen on; 0 takes a free one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the weights and of the computation."""
    max_batch: int = 16
    """Largest number of continuations that are decoded at the same time, in each backend."""
    max_waiting: int = 256
    """Largest number of continuations that wait for a place, in each backend; the server answers 429 beyond it. At
    least --max-batch."""
    api_key: str | None = None
    """Key that clients must send as a bearer token. By default none."""
    runs: tuple[Path, ...] = (Path("runs"),)
    """Run folders, and folders of runs, that the page shows besides the run of --run."""
    warm_up: bool = True
    """Compile at the start what plain sampling needs. Without it the first requests are slow."""


def backends(args: Args) -> list[str]:
    """The names of the backends, JAX first."""
    if args.backend in ("jax", "torch"):
        return [args.backend]
    installed = [name for name in ("jax", "torch") if importlib.util.find_spec(name)]
    if args.backend is None and installed:
        return installed
    return ["jax", "torch"]


def main() -> None:
    args = parse(Args, __doc__)
    if not 1 <= args.max_batch <= args.max_waiting:
        raise InputError(
            f"--max-batch must be at least 1, and --max-waiting at least --max-batch, got {args.max_batch} and "
            f"{args.max_waiting}"
        )
    from parity.serving.app import Options, make_app  # here, because the extra serve brings their packages
    from parity.serving.chat import served_template
    from parity.serving.engine import Engine
    from parity.serving.security import own_names
    from parity.serving.server import bind, new_server

    listeners = bind(args.host, args.port)
    names = backends(args)
    if len(names) > 1:  # they share the memory of a GPU, so JAX must not reserve most of it
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if args.api_key is None and args.host not in LOCAL_HOSTS:
        sys.stderr.write(f"warning: --host {args.host} without --api-key: whoever reaches it may use the model\n")
    engines: dict[str, Engine] = {}
    for name in names:
        own = {field.name: getattr(args, field.name) for field in dataclasses.fields(ModelArgs)}
        loaded = ModelArgs(**own | {"backend": name}).load()
        source = Path(args.run or args.model or "").resolve().name.encode("utf-8", "backslashreplace").decode()
        model_name = f"{source}-{name}"
        engines[model_name] = engine = Engine(
            model_name,
            loaded.backend,
            importlib.import_module(f"gpt_{name}.serving"),
            loaded.backend.cast(loaded.model, args.dtype),
            loaded.tokenizer,
            max_batch=args.max_batch,
            max_waiting=args.max_waiting,
            description=f"{loaded.device_info}, {args.dtype}",
            template=served_template(loaded.folder, args.adapter),
        )
        shown = printable(model_name, 200)
        sys.stderr.write(f"[{shown}: {engine.description}]\n")
        if args.warm_up:
            for rows, length in engine.shapes():
                sys.stderr.write(f"[{shown}: preparing batches of {rows} with prompts of up to {length} tokens]\n")
                engine.warm_up(rows, length)
    runs = [*([] if args.run is None else [loaded.folder.parents[1]]), *args.runs]
    app = make_app(engines, Options(args.api_key, own_names(args.host), runs))

    def announce(address: str) -> None:
        sys.stdout.write(f"serving {printable(', '.join(engines), 400)} at {address}\n")
        sys.stdout.flush()

    new_server(app, listeners, announce).run()


if __name__ == "__main__":
    with exit_with_message():
        main()
