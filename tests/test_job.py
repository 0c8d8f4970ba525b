"""Options of a training run: defaults, the model's shape, weights to start from, and runs of older versions."""

import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

import gpt_torch
import gpt_torch.train
from parity.config import PRESETS, GPTConfig
from parity.data.tokenizer import ByteTokenizer
from parity.data.tokenizer_files import write_tokenizer
from parity.errors import InputError
from parity.training import checkpoints, loop
from parity.training.args import JobArgs, parse_job_args
from parity.training.flops import estimated_time
from parity.training.initial import initial_arrays, own_tokenizer, weights_folder
from parity.training.job import load_job, start_run
from parity.training.loop import resume_and_train
from parity.training.runs import RunFolder, read_run
from parity.training.settings import recipe

CONSOLE = Console(quiet=True)
SHORT = ("--preset", "tiny", "--steps", 2, "--eval-every", 1, "--sample-tokens", 8, "--corpus", "short.txt")


@pytest.fixture(autouse=True, scope="module")
def working_folder(tmp_path_factory):
    """The current folder, with the text that the runs train on: evaluating a longer one takes most of the time."""
    before, folder = Path.cwd(), tmp_path_factory.mktemp("work")
    os.chdir(folder)
    Path("short.txt").write_text(OLD_TEXT, encoding="utf-8")
    yield
    os.chdir(before)


def parse(*arguments):
    return parse_job_args(JobArgs, None, list(map(str, arguments)))


def train(*arguments):
    """Train in this process with gpt_torch, as scripts/train_torch.py does; the job."""
    job = start_run(load_job(parse(*arguments)), "torch", {}, CONSOLE)
    trainer = gpt_torch.train.Trainer(job.config, job.settings, job.init_from)
    assert resume_and_train(trainer, job, CONSOLE) == 0
    return job


@pytest.fixture(scope="module")
def short_run(tmp_path_factory):
    """Folder of a run of two steps; not to be changed."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    train(*SHORT, "--run", folder)
    return folder


def test_every_field_of_the_model_is_an_option():
    shape = ("--n-vocab", 50304, "--n-ctx", 32, "--n-embd", 384, "--n-head", 6, "--n-layer", 5, "--drop-rate", 0.25)
    args = parse("--preset", "tiny", *shape, "--no-qkv-bias", "--no-tied-head")
    assert args.model == GPTConfig(50304, 32, 384, 6, 5, 0.25, qkv_bias=False, tied_head=False)
    assert load_job(args).config == args.model
    assert all(value != getattr(PRESETS["tiny"], name) for name, value in args.model.to_dict().items())


def test_the_vocabulary_is_the_tokenizers_unless_given():
    assert parse("--preset", "tiny").model == dataclasses.replace(PRESETS["tiny"], n_vocab=257)
    assert parse("--preset", "small", "--tokenizer", "gpt2").model.n_vocab == 50257
    assert parse("--preset", "124M", "--tokenizer", "bytes").model.n_vocab == 257
    with pytest.raises(InputError, match="--n-vocab: the model has 256 tokens, the bytes tokenizer 257"):
        load_job(parse("--preset", "tiny", "--n-vocab", 256))
    with pytest.raises(InputError, match="--sample-top-k 400: the model has only 257 tokens"):
        load_job(parse("--preset", "tiny", "--sample-top-k", 400))


def test_a_padded_vocabulary_is_sampled_and_decoded(tmp_path):
    """All 2,048 ids are equally likely before training, and most of them have no text."""
    run = tmp_path / "run"
    train(*SHORT, "--n-vocab", 2048, "--sample-top-k", "None", "--sample-temperature", 100, "--run", run)
    assert (run / "samples.txt").read_text(encoding="utf-8").count("The ") == 3


def test_samples_follow_the_settings(short_run, tmp_path):
    """Greedy where the temperature is 0, and with the defaults of earlier versions otherwise."""
    run = tmp_path / "run"
    job = train(*SHORT, "--sample-temperature", 0, "--run", run)
    model = gpt_torch.load_pretrained(checkpoints.newest_intact(run / "checkpoints"))
    prompt = job.prompts[0]
    [greedy] = gpt_torch.generate(model, [prompt], 8, temperature=0.0)
    [sampled] = gpt_torch.generate(model, [prompt], 8, temperature=0.8, top_k=50, seed=0)
    assert greedy != sampled

    def last_sample(folder):
        return (folder / "samples.txt").read_text(encoding="utf-8").split("--- step 2 ---\n")[1]

    assert last_sample(run) == job.tokenizer.decode(greedy) + "\n\n"
    assert last_sample(short_run) == job.tokenizer.decode(sampled) + "\n\n"


def test_the_prompts_of_an_evaluation_are_continued_together(tmp_path, monkeypatch):
    """In batches, with the texts that each prompt has alone; the last prompt nearly fills the context of 24 tokens."""
    texts, batches = ["The ", "B", "a prompt of 22 bytes: "], []

    def recording(model, prompts, *args, **options):
        batches.append(len(prompts))
        return gpt_torch.generate(model, prompts, *args, **options)

    monkeypatch.setattr(gpt_torch.train, "generate", recording)
    Path("prompts.txt").write_text("\n".join(texts), encoding="utf-8")
    for at_once, expected in ((32, [3]), (2, [2, 1])):
        monkeypatch.setattr(loop, "SAMPLES_AT_ONCE", at_once)
        batches.clear()
        run = tmp_path / str(at_once)
        job = train(*SHORT, "--steps", 1, "--eval-prompts", "prompts.txt", "--run", run)
        assert batches == expected * 2  # before training, and after the step
        model = gpt_torch.load_pretrained(checkpoints.newest_intact(run / "checkpoints"))
        alone = [
            gpt_torch.generate(model, [prompt], min(8, 24 - len(prompt)), temperature=0.8, top_k=50, seed=0)[0]
            for prompt in job.prompts
        ]
        samples = (run / "samples.txt").read_text(encoding="utf-8").split("--- step 1 ---\n")[1:]
        assert samples == [job.tokenizer.decode(row) + "\n\n" for row in alone]


def test_training_starts_from_a_run_or_a_checkpoint(short_run):
    """A run stands for its newest intact checkpoint, whose shape becomes the model's."""
    newest = short_run / "checkpoints" / "000002"
    assert weights_folder(short_run) == newest
    assert weights_folder(newest) == newest
    args = parse("--preset", "small", "--init-from", short_run)
    assert args.model == read_run(RunFolder(short_run)).model
    assert load_job(args).init_from == str(short_run)
    from_run, from_seed = (initial_arrays(args.model, args.settings, name).arrays for name in (short_run, None))
    saved = gpt_torch.load_pretrained(newest).state_dict()["tok_emb.weight"].numpy()
    assert np.array_equal(np.asarray(from_run["wte.weight"]), saved)
    assert not np.array_equal(np.asarray(from_seed["wte.weight"]), saved)
    assert load_job(parse("--init-from", short_run, "--tokenizer", "bytes", "--drop-rate", 0.5)).config.drop_rate == 0.5
    for option in (("--n-layer", 2), ("--n-ctx", 12), ("--n-vocab", 300)):
        with pytest.raises(InputError, match=f"{option[0]}: the model in --init-from .* has"):
            load_job(parse("--init-from", short_run, *option))


def test_a_resumed_run_keeps_its_shape(short_run):
    assert parse("--run", short_run, "--resume").model == read_run(RunFolder(short_run)).model
    for option, message in ((("--n-layer", 2), "model.n_layer was 3 and is now 2"), (("--no-qkv-bias",), "qkv_bias")):
        with pytest.raises(InputError, match=message):
            start_run(load_job(parse("--run", short_run, "--resume", *option)), "torch", {}, CONSOLE)


def test_old_spellings_warn(capsys):
    args = parse("--preset", "tiny", "--initial", "torch", "--validation-part", 0.25)
    assert (args.settings.init_scheme, args.settings.validation_fraction) == ("torch", 0.25)
    assert capsys.readouterr().err.splitlines() == [
        "warning: --initial is deprecated; use --init-scheme",
        "warning: --validation-part is deprecated; use --validation-fraction",
    ]


# Written by version 0.1.0 for the text below.
OLD_CONFIG = """{
  "preset": "tiny",
  "init": null,
  "corpus_sha256": "90a2c7449dfe45b6863a04a628c0bd1be1c53aca42d17755127a4da07809fcca",
  "model": {"n_vocab": 257, "n_ctx": 24, "n_embd": 20, "n_head": 4, "n_layer": 3, "drop_rate": 0.0, "qkv_bias": true,
            "tied_head": true},
  "train": {"corpus": "corpus.txt", "tokenizer": "bytes", "validation_part": 0.25, "stride": null, "steps": 4,
            "batch_size": 8, "accumulate": 1, "lr": 0.003, "min_lr": 0.0001, "warmup": 5, "weight_decay": 0.1,
            "beta1": 0.9, "beta2": 0.99, "eps": 1e-08, "clip": 1.0, "dtype": "float32", "eval_every": 2,
            "log_every": 10, "keep": 3, "keep_every": null, "skip_nonfinite": 0, "sample_prompt": "The ",
            "eval_prompts": null, "sample_tokens": 16, "initial": "torch", "seed": 0}
}
"""
OLD_TEXT = "The quick brown fox jumps over the lazy dog.\n" * 20


def test_runs_of_an_older_version_are_resumed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("corpus.txt").write_text(OLD_TEXT, encoding="utf-8")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(OLD_CONFIG)
    (run / "metrics.jsonl").write_text(json.dumps({"step": 0, "validation_loss": 6.0, "perplexity": 403.4}) + "\n")
    saved = read_run(RunFolder(run))
    assert saved.settings.validation_fraction == 0.25
    assert saved.settings.init_scheme == "torch"
    assert (saved.settings.sample_temperature, saved.settings.sample_top_k) == (0.8, 50)
    trainer = gpt_torch.train.Trainer(saved.model, saved.settings)
    checkpoints.save(run / "checkpoints", 0, trainer.save, keep=3)

    job = train("--run", run, "--resume")
    assert job.settings == saved.settings
    assert checkpoints.steps(run / "checkpoints") == [0, 2, 4]
    assert (run / "config.json").read_text() == OLD_CONFIG  # nothing changed, so nothing is written
    train("--run", run, "--resume", "--keep", 2)
    assert json.loads((run / "config.json").read_text())["train"]["init_scheme"] == "torch"
    with pytest.raises(InputError, match=r"validation_fraction was 0\.25 and is now 0\.5"):
        start_run(load_job(parse("--run", run, "--resume", "--validation-fraction", 0.5)), "torch", {}, CONSOLE)


def test_weights_of_the_preset_depend_on_seed_and_scheme():
    config, settings = PRESETS["tiny"], recipe("tiny").settings
    given = {
        (seed, scheme): initial_arrays(config, dataclasses.replace(settings, seed=seed, init_scheme=scheme)).arrays
        for seed in (0, 1)
        for scheme in ("gpt2", "torch")
    }
    first = [arrays["wte.weight"] for arrays in given.values()]
    assert all(not np.array_equal(a, b) for i, a in enumerate(first) for b in first[:i])


def test_the_tokenizer_of_the_weights_must_be_the_runs(tmp_path, short_run):
    config = dataclasses.replace(PRESETS["tiny"], n_vocab=50257)
    for name in ("foreign", "sentencepiece", "bytes", "none"):
        gpt_torch.save_pretrained(gpt_torch.GPTModel(config), tmp_path / name)
    (tmp_path / "foreign" / "merges.txt").write_text("#version: 0.2\na b\n")
    (tmp_path / "sentencepiece" / "tokenizer.model").write_bytes(b"")
    write_tokenizer(tmp_path / "bytes", ByteTokenizer(), 24)
    for name in ("foreign", "sentencepiece"):
        with pytest.raises(InputError, match="does not belong to GPT-2's tokenizer"):
            parse("--init-from", tmp_path / name)
        with pytest.raises(InputError, match="does not belong to GPT-2's tokenizer"):
            load_job(parse("--init-from", tmp_path / name, "--tokenizer", "bytes"))
    assert parse("--init-from", tmp_path / "bytes").settings.tokenizer == "bytes"
    assert parse("--init-from", tmp_path / "none").settings.tokenizer == "gpt2"
    load_job(parse("--init-from", tmp_path / "bytes"))
    load_job(parse("--init-from", tmp_path / "none", "--tokenizer", "bytes"))
    assert own_tokenizer(short_run) == "bytes"


def test_the_vocabulary_of_gpt2_beside_the_weights(tmp_path, vocab_bpe):
    config = dataclasses.replace(PRESETS["tiny"], n_vocab=50257)
    folder = tmp_path / "weights"
    gpt_torch.save_pretrained(gpt_torch.GPTModel(config), folder)
    shutil.copy(vocab_bpe, folder / "vocab.bpe")
    assert parse("--init-from", folder).settings.tokenizer == "gpt2"
    with pytest.raises(InputError, match=r"--tokenizer bytes: the weights in .* belong to the gpt2 tokenizer"):
        load_job(parse("--init-from", folder, "--tokenizer", "bytes"))


def test_the_time_of_a_run_is_stated_for_gpus_whose_peak_is_known():
    preset = recipe("124M-fineweb-edu")
    name = "NVIDIA H100 80GB HBM3"
    text = estimated_time(preset.model, preset.settings, name)
    assert text.startswith("6.0 hours for 19,073 steps of 1.1 s, if each GPU reaches 40% of its peak, 989 TFLOP/s")
    assert estimated_time(preset.model, preset.settings, name, 8).startswith("45.0 minutes for 19,073 steps of 0.14 s")
    assert not estimated_time(preset.model, preset.settings, "cpu")
    assert not estimated_time(preset.model, dataclasses.replace(preset.settings, dtype="float32"), name)
