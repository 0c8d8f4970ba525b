"""The workloads of all peers. Each imports its framework in its own process only."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np

from measure.timing import Workload, peak_resident
from parity.config import GPTConfig
from parity.training.settings import TrainSettings


def batch(config: GPTConfig, settings: TrainSettings) -> tuple[np.ndarray, np.ndarray]:
    """Draw random inputs and targets, both int32 [A, B, T]."""
    shape = (settings.batch_size // settings.micro_size, settings.micro_size, config.n_ctx + 1)
    ids = np.random.default_rng(0).integers(0, config.n_vocab, shape, dtype=np.int32)
    return ids[..., :-1].copy(), ids[..., 1:].copy()


# A training step


def jax_step(config: GPTConfig, settings: TrainSettings, unroll: int, remat: str, n_devices: int = 1) -> Workload:
    """An optimizer step of gpt_jax, from the batch on the host to the loss on the device or devices."""
    import jax

    from gpt_jax.devices import choose_attention
    from gpt_jax.sharding import MeshShape, make_mesh
    from gpt_jax.train import Trainer

    attention = choose_attention("auto", _jax_device(), settings.dtype, config).name
    trainers: list[Trainer] = []
    host = batch(config, settings)

    def step() -> None:
        if not trainers:  # made here, so that the first call includes everything that a user waits for
            mesh = make_mesh(MeshShape(data=n_devices)) if n_devices > 1 else None
            trainers.append(Trainer(config, settings, attention=attention, unroll=unroll, mesh=mesh, remat=remat))
        jax.block_until_ready(trainers[0].train_step(trainers[0].to_device(*host), 1e-3, 0))

    return in_jax(step)


def torch_step(config: GPTConfig, settings: TrainSettings, compile: bool, threads: int) -> Workload:
    """The same step of gpt_torch, with fused attention (cuDNN's if possible) and fused AdamW.

    On a GPU, torch.compile tunes its kernels by coordinate descent, as llm.c's train_gpt2.py has it do.
    """
    from gpt_torch.train import Trainer

    torch, device = set_up_torch(threads)
    if compile and device.type == "cuda":
        import torch._inductor.config as inductor

        inductor.coordinate_descent_tuning = True
    trainers: list[Trainer] = []
    host = batch(config, settings)

    def step() -> None:
        if not trainers:
            trainers.append(Trainer(config, settings, attention="sdpa", device=device, compile=compile))
        trainers[0].train_step(trainers[0].to_device(*host), 1e-3, 0)
        _synchronize(torch)

    return in_torch(step)


def transformers_step(config: GPTConfig, settings: TrainSettings, threads: int) -> Workload:
    """The same step of transformers' GPT2LMHeadModel (SDPA attention), with fused AdamW and torch's clipping."""
    from torch.nn import functional as F

    torch, device = set_up_torch(threads)
    model = transformers_model(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, fused=True)
    inputs, targets = (torch.from_numpy(ids).long().to(device) for ids in batch(config, settings))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")

    def step() -> None:
        for micro_inputs, micro_targets in zip(inputs, targets, strict=True):
            with autocast:
                logits = model(micro_inputs).logits
                loss = F.cross_entropy(logits.flatten(0, 1), micro_targets.flatten())
            (loss / len(inputs)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        _synchronize(torch)

    return in_torch(step)


# Generation


def jax_generation(config: GPTConfig, prompts: list[list[int]], n_new: int, dtype: str) -> Workload:
    import gpt_jax

    model = gpt_jax.for_decoding(gpt_jax.cast(gpt_jax.GPTModel(config), dtype))
    return in_jax(lambda: gpt_jax.generate(model, prompts, n_new, temperature=0))


def torch_generation(config: GPTConfig, prompts: list[list[int]], n_new: int, dtype: str, threads: int) -> Workload:
    import gpt_torch

    torch, device = set_up_torch(threads)
    model = gpt_torch.GPTModel(config).to(device, getattr(torch, dtype))
    return in_torch(lambda: gpt_torch.generate(model, prompts, n_new, temperature=0))


def transformers_generation(
    config: GPTConfig, prompts: list[list[int]], n_new: int, dtype: str, threads: int
) -> Workload:
    """generate() of transformers, with its default cache."""
    torch, device = set_up_torch(threads)
    model = transformers_model(config).to(device, getattr(torch, dtype)).eval()
    ids = torch.tensor(prompts, device=device)
    limits = {"max_new_tokens": n_new, "min_new_tokens": n_new, "pad_token_id": config.n_vocab - 1, "do_sample": False}

    def call() -> None:
        model.generate(ids, attention_mask=torch.ones_like(ids), **limits)
        _synchronize(torch)

    return in_torch(call)


# Loading. All values are summed, because transformers memory-maps a file, which is read when its values are used.


def jax_loading(folder: Path) -> Workload:
    import jax

    import gpt_jax

    _jax_device()
    return in_jax(lambda: [np.asarray(leaf).sum() for leaf in jax.tree.leaves(gpt_jax.load_pretrained(folder))])


def torch_loading(folder: Path) -> Workload:
    import gpt_torch

    return in_torch(lambda: _add_up(gpt_torch.load_pretrained(folder)))


def transformers_loading(folder: Path) -> Workload:
    from transformers import GPT2LMHeadModel
    from transformers.utils import logging

    logging.disable_progress_bar()
    return in_torch(lambda: _add_up(GPT2LMHeadModel.from_pretrained(folder)))


def _add_up(model: Any) -> None:
    for parameter in model.parameters():
        parameter.detach().numpy().sum()


# Tokenizing


def preparing(sources: list[Path], out: Path, vocab_bpe: Path | None, workers: int) -> Workload:
    """The work of prepare_data.py: texts to shards on disk."""
    import shutil

    from parity.data import shards
    from parity.data.tokenizer import load_tokenizer

    tokenizer = load_tokenizer("gpt2", vocab_bpe)

    def call() -> None:
        shutil.rmtree(out, ignore_errors=True)
        shards.prepare_shards(sources, out, tokenizer, workers=workers)

    return Workload(call, peak_resident, "cpu")


def tokenizing(sources: list[Path], vocab_bpe: Path | None, threads: int) -> Workload:
    """Plain tiktoken, to arrays in memory: text by text on one thread, or in tiktoken's batches on several.

    All texts are in memory at the same time.
    """
    import json

    from parity.data.tokenizer import GPT2Tokenizer, load_tokenizer

    tokenizer = load_tokenizer("gpt2", vocab_bpe)
    assert isinstance(tokenizer, GPT2Tokenizer)
    encoding = tokenizer.encoding

    def call() -> None:
        texts = [json.loads(line)["text"] for source in sources for line in source.open(encoding="utf-8")]
        if threads == 1:
            rows: Iterable[list[int]] = (encoding.encode_ordinary(text) for text in texts)
        else:
            rows = encoding.encode_ordinary_batch(texts, num_threads=threads)
        for ids in rows:
            np.array(ids, np.uint16)

    return Workload(call, peak_resident, "cpu")


# Reference workloads, which measure what the machine can do


def memory_reads(threads: int) -> Workload:
    """The sum of 512 MiB on all threads, which reads memory faster than the other operations of torch and NumPy."""
    torch, device = set_up_torch(threads)
    memory = torch.ones(2**27, device=device)

    def call() -> None:
        memory.sum()
        _synchronize(torch)

    return in_torch(call)


READ_BYTES = 4 * 2**27


def matmul() -> Workload:
    """A product of two square float32 matrices in JAX."""
    import jax

    square = jax.random.normal(jax.random.key(0), (MATMUL_SIZE, MATMUL_SIZE))
    multiply = jax.jit(lambda x: x @ x)
    return in_jax(lambda: multiply(square).block_until_ready())


def torch_matmul(threads: int) -> Workload:
    """The same product in torch, which uses another library."""
    torch, _ = set_up_torch(threads)
    square = torch.randn(MATMUL_SIZE, MATMUL_SIZE)
    return in_torch(lambda: square @ square)


MATMUL_SIZE = 2048
MATMUL_FLOPS = 2 * MATMUL_SIZE**3


def set_up_torch(threads: int) -> tuple[Any, Any]:
    """Set up torch, and return it with its device; raises InputError if a GPU is requested and there is none."""
    import torch

    from gpt_torch.devices import choose_device

    if threads:
        torch.set_num_threads(threads)
    device = choose_device("cuda" if os.environ["MEASURE_ON"] == "gpu" else "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        kernels = torch.nn.attention.SDPBackend
        fastest = [kernels.CUDNN_ATTENTION, kernels.FLASH_ATTENTION, kernels.EFFICIENT_ATTENTION, kernels.MATH]
        torch.nn.attention.sdpa_kernel(fastest, set_priority=True).__enter__()  # until this process ends
    return torch, device


def _jax_device() -> Any:
    """Return the device that is measured; raises InputError if a GPU is requested and there is none."""
    from gpt_jax.devices import choose_device

    return choose_device(os.environ["MEASURE_ON"])


def transformers_model(config: GPTConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes: dict[str, Any] = {"vocab_size": config.n_vocab, "n_positions": config.n_ctx, "n_embd": config.n_embd}
    rest: dict[str, Any] = {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    return GPT2LMHeadModel(GPT2Config(**sizes, **rest, n_head=config.n_head, n_layer=config.n_layer))


def _synchronize(torch: Any) -> None:
    if os.environ["MEASURE_ON"] == "gpu":
        torch.cuda.synchronize()


def in_torch(call: Callable[[], Any]) -> Workload:
    if os.environ["MEASURE_ON"] == "gpu":
        import torch

        return Workload(call, torch.cuda.max_memory_allocated, torch.cuda.get_device_name())
    return Workload(call, peak_resident, "cpu")


def in_jax(call: Callable[[], Any]) -> Workload:
    device = _jax_device()
    if device.platform == "cpu":
        return Workload(call, peak_resident, "cpu")
    return Workload(call, lambda: (device.memory_stats() or {}).get("peak_bytes_in_use", 0), device.device_kind)
