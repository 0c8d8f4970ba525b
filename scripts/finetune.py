"""Tune a model on instructions with responses, texts with labels, or preferences. Both backends take the same steps.

python scripts/finetune.py                                        # a small model, on instructions made by rule
python scripts/finetune.py --init-from runs/NAME                  # the same, from the weights of a run
python scripts/finetune.py --backend torch --init-from 355M --data instruction-data.json --preset book-instruct
python scripts/finetune.py --task classify                        # a small model, on labels of texts made by rule
python scripts/finetune.py --task prefer --init-from runs/NAME    # that model, on preferences made by rule
python scripts/finetune.py --run runs/NAME --resume               # a run of either backend
python scripts/finetune.py --run runs/NAME --predict test.json --out answers.json
"""

import contextlib
import dataclasses
import importlib
import sys
from pathlib import Path
from typing import Any, Literal

from parity.cli import changed_options
from parity.console import PlainConsole
from parity.errors import InputError, exit_with_message
from parity.loading import ModelArgs
from parity.storage.paths import user_path
from parity.training.job import Job, describe_precision, load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.processes import JoinArgs, Processes
from parity.training.runs import RunFolder
from parity.training.settings import FINE_TUNING, recipe
from parity.tuning.args import SavedTuning, TuneArgs, parse_tune_args, read_tuning, saved_args
from parity.tuning.classify import predict_labels
from parity.tuning.predict import predict
from parity.tuning.tasks import TASKS
from parity.weights.adapters import n_adapter_params


@dataclasses.dataclass(frozen=True)
class Args(JoinArgs, TuneArgs):
    backend: Literal["jax", "torch"] = "jax"
    """Framework that tunes the model, or that runs it with --predict."""
    device: Literal["auto", "cpu", "gpu", "cuda", "tpu", "mps"] = "auto"
    """Device that runs the model. auto takes an accelerator if the framework sees one; gpu and cuda are the same."""
    mesh: str | None = None
    """Number of devices along each axis of JAX's mesh, for example data=2,fsdp=2. With torch use torchrun instead."""
    compilation_cache: bool = True
    """Keep the programs that JAX compiles in the cache folder, so that the next start need not compile them."""
    predict: Path | None = None
    """File of instructions that the run in --run answers, or of texts that it labels, in place of training; it has the
    form of the data. An answer has at most --sample-tokens tokens, by default as many as the run's samples."""
    out: Path | None = None
    """File that the answers or labels of --predict are written to, as JSON."""
    checkpoint: str = "newest"
    """With --predict, the checkpoint that answers: newest (the newest intact one), best (lowest validation loss), or a
    step number."""


def main() -> int:
    args = parse_tune_args(Args, __doc__)
    if args.mesh is not None and args.backend == "torch":
        raise InputError(
            "--mesh is an option of JAX; with --backend torch start one process per device: "
            "torchrun --nproc-per-node N -- scripts/finetune.py --backend torch"
        )
    if args.predict is not None or args.out is not None:
        return answer_file(args)
    if args.checkpoint != "newest":
        raise InputError("--checkpoint is for --predict; a run is resumed from its newest intact checkpoint")
    with processes(args) as these:
        console = PlainConsole(quiet=not these.first, lossy=True)
        prepare = prepare_jax if args.backend == "jax" else prepare_torch
        task = TASKS[args.tune.task]
        job = load_job(args, these, lambda _, tokenizer: task.load(args, tokenizer))
        trainer, device_info = prepare(args, job, task.objective(f"gpt_{args.backend}", args.tune))
        return resume_and_train(trainer, start_run(job, args.backend, device_info, console), console)


def processes(args: Args) -> contextlib.AbstractContextManager[Processes]:
    """Join the other processes, if there are any."""
    module = importlib.import_module(f"gpt_{args.backend}.distributed")
    if args.backend == "jax":
        return module.processes(*args.join_options)
    args.refuse_for_torch("scripts/finetune.py")
    return module.processes(args.join_timeout)


def prepare_torch(args: Args, job: Job, objective: Any) -> tuple[Any, dict[str, str]]:
    """Return the trainer, and facts about the device for the summary."""
    from gpt_torch.devices import choose_device, describe
    from gpt_torch.train import Trainer

    if job.micro_size % job.processes.count:
        raise InputError(
            f"micro-batches of {job.micro_size} examples are not divisible by {job.processes.count} processes; "
            "change --batch-size or --accumulate"
        )
    device = choose_device(args.device)
    attention = "explicit" if args.tune.packing else "sdpa"
    trainer = Trainer(
        job.config,
        job.settings,
        job.init_from,
        attention,
        device,
        processes=job.processes,
        lora=args.tune.lora,
        objective=objective,
        **job.trainer_options,
    )
    precision = describe_precision(job.settings, attention)
    return trainer, {"device": describe(device), "precision": precision, **describe_adapters(args)}


def prepare_jax(args: Args, job: Job, objective: Any) -> tuple[Any, dict[str, str]]:
    """Return the trainer, and facts about the device for the summary."""
    import jax

    from gpt_jax.compilation_cache import enable_compilation_cache
    from gpt_jax.devices import choose_attention, choose_device, describe
    from gpt_jax.sharding import choose_mesh
    from gpt_jax.train import Trainer

    device = choose_device(args.device)
    jax.config.update("jax_default_device", device)
    jax.config.update("jax_enable_x64", job.settings.dtype == "float64")
    enable_compilation_cache(args.compilation_cache, job.processes.count)
    wanted = "explicit" if args.tune.packing else "auto"
    attention = choose_attention(wanted, device, job.settings.dtype, job.config)
    unroll, remat = recipe(FINE_TUNING).program(job.config.n_layer, device.platform)
    mesh, _, mesh_info = choose_mesh(args.mesh, job.config, job.micro_size, device.platform)
    trainer = Trainer(
        job.config,
        job.settings,
        job.init_from,
        attention.name,
        unroll,
        mesh,
        remat,
        lora=args.tune.lora,
        objective=objective,
        **job.trainer_options,
    )
    precision = describe_precision(job.settings, str(attention))
    return trainer, {"device": describe(device) + mesh_info, "precision": precision, **describe_adapters(args)}


def describe_adapters(args: Args) -> dict[str, str]:
    """Return the line of the summary about adapters, if there are any."""
    lora = args.tune.lora
    if lora is None:
        return {}
    return {"adapters": f"rank {lora.rank}, {n_adapter_params(args.model, lora):,} parameters; only these are trained"}


def answer_file(args: Args) -> int:
    """Answer the instructions of --predict, or label its texts, with a finished run, and write the results."""
    if args.predict is None or args.out is None or args.run is None:
        raise InputError("--predict FILE --out FILE needs --run, the run that answers; give all three")
    saved = read_tuning(RunFolder(args.run))
    refuse_training_options(args, saved)
    options = ModelArgs(
        run=str(args.run),
        checkpoint=args.checkpoint,
        backend=args.backend,
        device=args.device,
        vocab_bpe=args.vocab_bpe,
        compilation_cache=args.compilation_cache,
    )
    files = user_path(args.predict), user_path(args.out)
    if saved.tune.task == "classify":
        loaded = options.load(classifier=True)
        summary = predict_labels(loaded.backend, loaded.model, loaded.tokenizer, *files)
    else:
        loaded = options.load()
        most = args.settings.sample_tokens
        summary = predict(loaded.backend, loaded.model, loaded.tokenizer, saved.tune, most, *files)
    PlainConsole(lossy=True).print(summary, soft_wrap=True)
    return 0


def refuse_training_options(args: Args, saved: SavedTuning) -> None:
    """Raise InputError if --predict is given an option that only training uses, with another value than the run's."""
    names = ("run", "checkpoint", "backend", "device", "vocab_bpe", "compilation_cache", "predict", "out")
    used = {name: getattr(args, name) for name in names}
    unused = changed_options(args, dataclasses.replace(saved_args(Args, saved), **used))
    if saved.tune.task != "classify":
        unused = [option for option in unused if option != "--sample-tokens"]
    if unused:
        option = "--data" if unused[0] == "--corpus" else unused[0]
        raise InputError(f"{option} has no effect on --predict, which uses the settings of the run; leave it out")


if __name__ == "__main__":
    with exit_with_message():
        sys.exit(main())
