"""What the PyTorch step does in one process of several."""

import dataclasses

from support.models import TINY, random_batch

from gpt_torch.train import Trainer
from parity.training.processes import Processes
from parity.training.settings import recipe


def test_dropout_is_a_function_of_seed_step_and_process():
    config, settings = dataclasses.replace(TINY, drop_rate=0.3), recipe("tiny").settings
    inputs, targets = (array[None] for array in random_batch(config, 2))

    def loss(step=0, process=0):
        trainer = Trainer(config, settings, processes=Processes(index=process))
        return float(trainer.train_step(trainer.to_device(inputs, targets), 1e-3, step)["loss"])

    assert loss() == loss()
    # The initial weights are the same, so that only dropout can change the loss.
    assert len({loss(), loss(step=1), loss(process=1)}) == 3
