"""The peers: ours and what else one could run. Each imports its framework in its own process only."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from measure.turns import Subject
from parity.config import GPTConfig
from parity.training.settings import TrainSettings


def batch(config: GPTConfig, settings: TrainSettings) -> tuple[np.ndarray, np.ndarray]:
    """Random inputs and targets int32 [A, B, T]."""
    shape = (settings.accumulate, settings.batch_size // settings.accumulate, config.n_ctx + 1)
    ids = np.random.default_rng(0).integers(0, config.n_vocab, shape, dtype=np.int32)
    return ids[..., :-1].copy(), ids[..., 1:].copy()


# A training step


def jax_step(config: GPTConfig, settings: TrainSettings, unroll: int, remat: str) -> Subject:
    """From the batch on the host to the loss on the device."""
    import jax

    from gpt_jax.devices import choose_attention
    from gpt_jax.train import Trainer

    attention = choose_attention("auto", _jax_device(), settings.dtype, config.drop_rate)
    made: list[Trainer] = []
    host = batch(config, settings)

    def step() -> None:
        if not made:  # so that the first call has everything that a user waits for
            made.append(Trainer(config, settings, attention=attention, unroll=unroll, remat=remat))
        jax.block_until_ready(made[0].train_step(*made[0].to_device(*host), 1e-3, 0))

    return _in_jax(step)


def torch_step(config: GPTConfig, settings: TrainSettings, compile: bool, threads: int) -> Subject:
    """The same in torch: its fused attention, cuDNN's first, and its fused AdamW."""
    from gpt_torch.train import Trainer

    torch, device = _torch(threads)
    made: list[Trainer] = []
    host = batch(config, settings)

    def step() -> None:
        if not made:
            made.append(Trainer(config, settings, attention="sdpa", device=device, compile=compile))
        made[0].train_step(*made[0].to_device(*host), 1e-3, 0)
        _wait(torch)

    return _in_torch(step)


def transformers_step(config: GPTConfig, settings: TrainSettings, threads: int) -> Subject:
    """GPT2LMHeadModel as it comes, SDPA, with the same optimizer and clipping."""
    from torch.nn import functional as F

    torch, device = _torch(threads)
    model = _transformers(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    inputs, targets = (torch.from_numpy(part).long().to(device) for part in batch(config, settings))
    narrow = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")

    def step() -> None:
        for micro in zip(inputs, targets, strict=True):
            with narrow:
                logits = model(micro[0]).logits
                loss = F.cross_entropy(logits.flatten(0, 1), micro[1].flatten())
            (loss / len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _wait(torch)

    return _in_torch(step)


# Generation


def jax_generation(config: GPTConfig, rows: list[list[int]], new: int, dtype: str) -> Subject:
    import gpt_jax

    model = gpt_jax.for_decoding(gpt_jax.cast(gpt_jax.GPTModel(config), dtype))
    return _in_jax(lambda: gpt_jax.generate(model, rows, new, temperature=0))


def torch_generation(config: GPTConfig, rows: list[list[int]], new: int, dtype: str, threads: int) -> Subject:
    import gpt_torch

    torch, device = _torch(threads)
    model = gpt_torch.GPTModel(config).to(device, getattr(torch, dtype))
    return _in_torch(lambda: gpt_torch.generate(model, rows, new, temperature=0))


def transformers_generation(config: GPTConfig, rows: list[list[int]], new: int, dtype: str, threads: int) -> Subject:
    """Its generate with its default cache."""
    torch, device = _torch(threads)
    model = _transformers(config).to(device, getattr(torch, dtype)).eval()
    ids = torch.tensor(rows, device=device)
    limits = {"max_new_tokens": new, "min_new_tokens": new, "pad_token_id": config.n_vocab - 1, "do_sample": False}

    def call() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        _wait(torch)

    return _in_torch(call)


# Loading, until every number has been read once: transformers maps a file and reads it later


def jax_loaded(folder: Path) -> Subject:
    import jax

    import gpt_jax

    _jax_device()
    return _in_jax(lambda: [np.asarray(leaf).sum() for leaf in jax.tree.leaves(gpt_jax.load_pretrained(folder))])


def torch_loaded(folder: Path) -> Subject:
    import gpt_torch

    return _in_torch(lambda: _add_up(gpt_torch.load_pretrained(folder)))


def transformers_loaded(folder: Path) -> Subject:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return _in_torch(lambda: _add_up(GPT2LMHeadModel.from_pretrained(folder)))


def _add_up(model: Any) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy().sum()


# Tokenizing


def prepared(source: Path, out: Path, vocab_bpe: Path | None, workers: int) -> Subject:
    """prepare_data.py's work, to shards on the disk."""
    import shutil

    from parity.data import shards
    from parity.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("gpt2", vocab_bpe)

    def call() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shards.prepare_shards([source], out, tokenizer, workers=workers)

    return Subject(call, _resident, "cpu")


def tokenized(source: Path, vocab_bpe: Path | None, threads: int) -> Subject:
    """tiktoken used plainly, to arrays in memory: one text after another, or its own batches."""
    import json

    from parity.data.tokenizer import load_tokenizer

    encoding = load_tokenizer("gpt2", vocab_bpe).encoding

    def call() -> None:
        texts = [json.loads(line)["text"] for line in source.open(encoding="utf-8")]
        if threads == 1:
            rows = (encoding.encode_ordinary(text) for text in texts)
        else:
            rows = iter(encoding.encode_ordinary_batch(texts, num_threads=threads))
        for ids in rows:
            np.array(ids, np.uint16)

    return Subject(call, _resident, "cpu")


# Meters: what the machine gives


def memory_reads(threads: int) -> Subject:
    """The sum of 512 MiB on all threads: of what torch and NumPy have, the fastest way to read memory."""
    torch, device = _torch(threads)
    memory = torch.ones(2**27, device=device)

    def call() -> None:
        memory.sum()
        _wait(torch)

    return _in_torch(call)


READ_BYTES = 4 * 2**27


def products() -> Subject:
    """A product of two square float32 matrices in JAX, faster on a CPU than torch's."""
    import jax

    square = jax.random.normal(jax.random.key(0), (PRODUCT_SIZE, PRODUCT_SIZE))
    multiply = jax.jit(lambda x: x @ x)
    return _in_jax(lambda: multiply(square).block_until_ready())


PRODUCT_SIZE = 2048
PRODUCT_FLOPS = 2 * PRODUCT_SIZE**3


def _torch(threads: int) -> tuple[Any, Any]:
    """torch, set up, and its device; raises InputError where a GPU is wanted and missing."""
    import torch

    from gpt_torch.devices import choose_device

    if threads:
        torch.set_num_threads(threads)
    device = choose_device("cuda" if os.environ["MEASURE_ON"] == "gpu" else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        kernels = torch.nn.attention.SDPBackend
        fastest = [kernels.CUDNN_ATTENTION, kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH]
        torch.nn.attention.sdpa_kernel(fastest, set_priority=True).__enter__()  # for this process's whole life
    return torch, device


def _jax_device() -> Any:
    """Raises InputError where a GPU is wanted and missing."""
    from gpt_jax.devices import choose_device

    return choose_device(os.environ["MEASURE_ON"])


def _transformers(config: GPTConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"vocab_size": config.n_vocab, "n_positions": config.n_ctx, "n_embd": config.n_embd}
    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(**sizes, **none, n_head=config.n_head, n_layer=config.n_layer))


def _wait(torch: Any) -> None:
    if os.environ["MEASURE_ON"] == "gpu":
        torch.cuda.synchronize()


def _in_torch(call: Callable[[], Any]) -> Subject:
    if os.environ["MEASURE_ON"] == "gpu":
        import torch

        return Subject(call, torch.cuda.max_memory_allocated, torch.cuda.get_device_name())
    return Subject(call, _resident, "cpu")


def _in_jax(call: Callable[[], Any]) -> Subject:
    device = _jax_device()
    if device.platform == "cpu":
        return Subject(call, _resident, "cpu")
    return Subject(call, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0), device.device_kind)


def _resident() -> int:
    """This process's largest resident set, Linux's high-water mark; 0 where there is none to read."""
    status = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if os.path.exists(status) else None
    return 1024 * int(found[1]) if found else 0
