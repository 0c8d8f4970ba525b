"""Folders of models that are complete for a model hub."""

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from parity.config import GPTConfig
from parity.data.tokenizer import Tokenizer
from parity.data.tokenizer_files import write_tokenizer
from parity.weights import huggingface, n_params
from parity.weights.hf_config import end_of_text_id

_CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- gpt2
---

# GPT-2 with {n_params:,} parameters

{n_layer} layers, width {n_embd}, {n_head} heads, context {n_ctx}, vocabulary {n_vocab}.

```python
from transformers import {classes}

model = AutoModelForCausalLM.from_pretrained("THIS FOLDER"){tokenizer}
```

Describe here which data the model was trained on, what it is for, and under which license it may be used.
"""


def save_model(
    folder: Path, config: GPTConfig, arrays: Mapping[str, np.ndarray], tokenizer: Tokenizer | None = None
) -> None:
    """Write what `save_pretrained` of both backends writes.

    Args:
        folder: The folder, which is made if it does not exist.
        config: The model's configuration.
        arrays: The weights, in the huggingface format.
        tokenizer: The model's tokenizer; None writes none.
    """
    huggingface.write(folder, config, arrays, eos_id=None if tokenizer is None else tokenizer.eos_id)
    write_hub_files(folder, config, tokenizer)


def write_hub_files(folder: Path, config: GPTConfig, tokenizer: Tokenizer | None = None) -> None:
    """Write generation_config.json, a model card, and the tokenizer's files.

    Args:
        folder: The folder with config.json and weights.
        config: The model's configuration.
        tokenizer: The model's tokenizer; None writes none.
    """
    eos_id = end_of_text_id(config, None if tokenizer is None else tokenizer.eos_id)
    ids = dict.fromkeys(("bos_token_id", "eos_token_id"), eos_id)
    (folder / "generation_config.json").write_text(json.dumps(ids, indent=2) + "\n")
    if tokenizer is not None:
        write_tokenizer(folder, tokenizer, config.n_ctx)
    if not (folder / "README.md").exists():  # a card that somebody wrote is kept
        has_tokenizer = (folder / "tokenizer_config.json").exists() or (folder / "merges.txt").exists()
        text = _CARD.format(
            **config.to_dict(),
            n_params=n_params(config),
            classes="AutoModelForCausalLM, AutoTokenizer" if has_tokenizer else "AutoModelForCausalLM",
            tokenizer='\ntokenizer = AutoTokenizer.from_pretrained("THIS FOLDER")' if has_tokenizer else "",
        )
        (folder / "README.md").write_text(text, encoding="utf-8")
