"""The benchmark of LoRA: a step that trains adapters in both backends, and in peft with transformers' model."""

import dataclasses

from measure import peers
from measure.args import Args
from measure.report import Measurement
from measure.timing import Spec, Workload, interleave
from parity.config import GPTConfig
from parity.training.settings import TrainSettings, recipe
from parity.weights.adapters import LoraConfig, n_adapter_params

CONTEXT = 256


def lora(args: Args) -> list[Measurement]:
    """Measure a step that trains adapters of rank 16 on all linear layers, on windows of 256 tokens."""
    preset = recipe(args.preset or args.size)
    config = dataclasses.replace(preset.model, n_ctx=min(CONTEXT, preset.model.n_ctx))
    batch_size = args.batch_size or 4
    settings = TrainSettings(batch_size=batch_size, accumulate=1, dtype="bfloat16" if args.gpu else "float32")
    options = LoraConfig(rank=16)
    unroll, _ = preset.program(config.n_layer, "gpu" if args.gpu else "cpu")
    specs: dict[str, Spec] = {
        "gpt_jax": args.spec(jax_step, config, settings, options, unroll),
        "gpt_torch": args.spec(torch_step, config, settings, options, args.threads),
        "peft, transformers": args.spec(peft_step, config, settings, options, args.threads),
    }
    timings, _ = interleave(args.selected(specs), args.rounds, args.calls)
    title = (
        f"LoRA step: {args.preset or args.size}, {n_adapter_params(config, options):,} parameters in adapters, "
        f"B={batch_size}, T={config.n_ctx}, {settings.dtype}"
    )
    return [Measurement(title, "step", batch_size * config.n_ctx, "tokens", timings)]


def jax_step(config: GPTConfig, settings: TrainSettings, options: LoraConfig, unroll: int) -> Workload:
    """An optimizer step of gpt_jax, from the batch on the host to the loss on the device."""
    import jax

    from gpt_jax.train import Trainer

    trainer, host = Trainer(config, settings, unroll=unroll, lora=options), peers.batch(config, settings)
    return peers.in_jax(lambda: jax.block_until_ready(trainer.train_step(trainer.to_device(*host), 1e-3, 0)))


def torch_step(config: GPTConfig, settings: TrainSettings, options: LoraConfig, threads: int) -> Workload:
    """The same step of gpt_torch, with fused attention and fused AdamW."""
    from gpt_torch.train import Trainer

    _, device = peers.set_up_torch(threads)
    trainer = Trainer(config, settings, attention="sdpa", device=device, lora=options)
    host = peers.batch(config, settings)
    return peers.in_torch(lambda: float(trainer.train_step(trainer.to_device(*host), 1e-3, 0)["loss"]))


def peft_step(config: GPTConfig, settings: TrainSettings, options: LoraConfig, threads: int) -> Workload:
    """The same step of peft and transformers' GPT2LMHeadModel, SDPA attention, fused AdamW and torch's clipping."""
    import peft
    from torch.nn import functional as F

    torch, device = peers.set_up_torch(threads)
    theirs = peft.LoraConfig(
        r=options.rank,
        lora_alpha=int(options.alpha),
        target_modules=["c_attn", "c_proj", "c_fc"],
        fan_in_fan_out=True,
        task_type="CAUSAL_LM",
    )
    model = peft.get_peft_model(peers.transformers_model(config), theirs).to(device).train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trained) == n_adapter_params(config, options)
    optimizer = torch.optim.AdamW(trained, 1e-3, fused=True)
    inputs, targets = (torch.from_numpy(ids).long().to(device) for ids in peers.batch(config, settings))
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=settings.dtype == "bfloat16")

    def step() -> float:
        with autocast:
            logits = model(inputs[0]).logits
            loss = F.cross_entropy(logits.flatten(0, 1), targets[0].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, settings.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return peers.in_torch(step)
