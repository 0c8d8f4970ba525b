"""The functions of the notebook "GPT-2 from scratch" that need no framework, so that its code runs unchanged.

Those that need a framework are in gpt_torch/notebook.py and gpt_jax/notebook.py, and use the functions here. They
train as simply as the notebook does: a constant learning rate and no gradient clipping.
"""

from parity.notebook.batches import (
    DataLoader,
    GPTDatasetV1,
    create_dataloader,
    encode_text,
    print_on_one_line,
    token_ids_to_text,
)
from parity.notebook.nesting import as_huggingface, download_and_load_gpt2, flatten, nest
from parity.notebook.training import mean_loss, plot_losses, train_loop

__all__ = [
    "DataLoader",
    "GPTDatasetV1",
    "as_huggingface",
    "create_dataloader",
    "download_and_load_gpt2",
    "encode_text",
    "flatten",
    "mean_loss",
    "nest",
    "plot_losses",
    "print_on_one_line",
    "token_ids_to_text",
    "train_loop",
]
