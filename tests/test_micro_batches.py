"""--accumulate auto: the largest micro-batch whose compiled step fits. Limits are faked, compilations are not."""

import dataclasses
import json
import re
import sys

import jax
import numpy as np
import pytest
import train_jax
import train_torch

from gpt_jax.lowering import StepOptions, lower_train_step, memory_bytes
from gpt_jax.micro_batches import USABLE, choose_micro_batch, memory_limit, possible_numbers, search
from gpt_jax.sharding import MeshShape
from gpt_jax.train import Trainer
from parity.config import GPTConfig
from parity.errors import InputError
from parity.training.processes import Processes
from parity.training.settings import recipe

CONFIG = GPTConfig(n_vocab=257, n_ctx=64, n_embd=32, n_head=2, n_layer=1)
SETTINGS = dataclasses.replace(recipe("tiny").settings, batch_size=4, accumulate="auto")
OPTIONS = StepOptions()
CPU = jax.devices("cpu")[0]


@pytest.fixture(scope="module")
def sizes():
    """{number of micro-batches: bytes of the compiled step}"""
    settings = {number: dataclasses.replace(SETTINGS, accumulate=number) for number in (1, 2, 4)}
    return {n: memory_bytes(lower_train_step(CONFIG, settings[n], OPTIONS, CPU).compile()) for n in settings}


def limit_for(needed):
    return int(needed / USABLE) + 1


def choose(limit, **options):
    settings, needed = choose_micro_batch(CONFIG, SETTINGS, OPTIONS, CPU, limit, **options)
    return settings.accumulate, needed


def test_the_largest_micro_batch_that_fits_is_chosen(sizes):
    assert list(sizes.values()) == sorted(sizes.values(), reverse=True)
    for number, needed in sizes.items():
        assert choose(limit_for(needed)) == (number, needed)
        if number > 1:
            assert choose(limit_for(sizes[number // 2]) - 2) == (number, needed)


def test_what_fits_in_no_way_is_refused(sizes):
    message = "the step takes 0.00 GB with 1 windows per micro-batch, and JAX may allocate 0.00 GB on each device; use "
    with pytest.raises(InputError, match=re.escape(message) + "--remat all, a mesh"):
        choose(limit_for(sizes[4]) // 2)


def test_all_processes_choose_what_fits_the_smallest_device(sizes):
    small = limit_for(sizes[2])
    others = Processes(0, 2, lambda number: max(number, -small))
    assert choose(10 * limit_for(sizes[1]), processes=others) == (2, sizes[2])


@pytest.mark.parametrize(
    ("estimates", "limit", "expected", "compiled"),
    [
        ({1: 80, 2: 40, 4: 20}, 100, (1, 80), [1]),
        ({1: 88, 2: 44, 4: 22}, 81, (1, 80), [2, 1]),  # the estimate was too high
        ({1: 66, 2: 33, 4: 16}, 70, (2, 40), [1, 2]),  # too low
        ({1: 30, 2: 20, 4: 10}, 30, (4, 20), [1, 2, 4]),
        ({1: 82, 2: 42, 4: 22}, 79, (2, 40), [2, 1]),  # it might fit, and does not
        ({1: 100, 2: 42, 4: 22}, 79, (2, 40), [2]),  # it cannot fit
        ({1: 80, 2: 40, 4: 20}, 10, (4, 20), [4]),
    ],
)
def test_search_corrects_the_estimate(estimates, limit, expected, compiled):
    order = []

    def compile_step(number):
        order.append(number)
        return {1: 80, 2: 40, 4: 20}[number]

    assert search(estimates, compile_step, limit) == expected
    assert order == compiled


def test_batches_are_divided_evenly_over_a_mesh():
    assert possible_numbers(480, MeshShape(tensor=2))[:5] == [1, 2, 3, 4, 5]
    assert possible_numbers(48, MeshShape(data=2, fsdp=2)) == [1, 2, 3, 4, 6, 12]
    with pytest.raises(InputError, match="batches of 12 windows are not divisible by data x fsdp = 8"):
        possible_numbers(12, MeshShape(data=8))


def test_the_lowered_step_is_the_one_that_the_trainer_runs():
    """So the persistent compilation cache has it when the training starts."""
    settings = dataclasses.replace(SETTINGS, accumulate=2)
    for config in (CONFIG, dataclasses.replace(CONFIG, drop_rate=0.1)):
        trainer = Trainer(config, settings)
        batch = np.zeros((2, 2, config.n_ctx), np.int32)
        numbers = (trainer._to_mesh(number) for number in (np.asarray(1e-3, np.float32), np.asarray(0, np.int32)))
        run = trainer._train_step.lower(trainer.state, trainer.to_device(batch, batch), *numbers)
        assert run.as_text() == lower_train_step(config, settings, OPTIONS, CPU).as_text()


def test_the_smallest_limit_of_this_process_counts():
    class Device:
        process_index = 0

        def __init__(self, limit):
            self.memory_stats = lambda: None if limit is None else {"bytes_limit": limit}

    assert memory_limit([Device(3), Device(2)]) == 2
    assert memory_limit([Device(None)]) is None
    assert memory_limit([CPU]) is None


def run_main(script, monkeypatch, *options):
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, options)])
    return script.main()


def test_a_run_prints_and_keeps_the_number(tmp_path, monkeypatch, capsys):
    run, tiny = tmp_path / "run", ("--preset", "tiny", "--accumulate", "auto")
    settings = dataclasses.replace(recipe("tiny").settings, accumulate=2)
    model = dataclasses.replace(recipe("tiny").model, n_vocab=257)
    needed = memory_bytes(lower_train_step(model, settings, StepOptions(), CPU).compile())
    monkeypatch.setattr(train_jax, "memory_limit", lambda devices: limit_for(needed))
    assert run_main(train_jax, monkeypatch, *tiny, "--steps", 2, "--run", run) == 0
    assert json.loads((run / "config.json").read_text())["train"]["accumulate"] == 2
    output = capsys.readouterr().out
    assert "memory     the compiled step takes 0.0 of 0.0 GB, with 4 windows per micro-batch (--accumulate 2)" in output
    assert "compiling  the step with 4 windows per micro-batch" in output
    monkeypatch.setattr(train_jax, "memory_limit", lambda devices: 10**12)
    assert run_main(train_jax, monkeypatch, "--run", run, "--resume", "--accumulate", "auto") == 0
    assert json.loads((run / "config.json").read_text())["train"]["accumulate"] == 2
    assert "the step is estimated to take 0.0 of 1000.0 GB" in capsys.readouterr().out


@pytest.mark.parametrize("script", [train_jax, train_torch], ids=lambda script: script.__name__)
def test_on_a_cpu_and_in_torch_a_number_is_needed(script, tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"^--accumulate auto works in train_jax\.py on a GPU only; give a number$"):
        run_main(script, monkeypatch, "--preset", "tiny", "--accumulate", "auto", "--run", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_presets_on_a_gpu_compute_nothing_twice_and_write_out_all_layers():
    assert recipe("1558M").program(48, "gpu") == (48, "none")
    assert recipe("1558M").program(48, "cpu") == (1, "products")
    assert recipe("124M").program(12, "cpu") == (12, "none")
    assert recipe("124M").program(2, "cpu") == (2, "none")
