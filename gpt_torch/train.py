"""Training in PyTorch with torch.optim.AdamW; gpt_jax/train.py is its twin.

torch's AdamW and optax's compute the same function of the same hyperparameters, but their defaults differ, so both
backends set weight decay and eps explicitly, and clip gradients with code of their own.
"""

import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gpt_torch.classifier import add_classifier, label_objective, save_classifier
from gpt_torch.distributed import all_rows, all_sum
from gpt_torch.generate import generate
from gpt_torch.lora import add_lora, save_adapter
from gpt_torch.loss import summed_loss
from gpt_torch.model import GPTModel
from gpt_torch.pretrained import save_weights
from gpt_torch.weights import copy_arrays, load_weights
from parity import weights
from parity.config import GPTConfig
from parity.training import checkpoints, optimizer_state
from parity.training.initial import Base, base_of, check_base, check_classifier, initial_arrays
from parity.training.objective import Objective
from parity.training.processes import ALONE, Processes
from parity.training.settings import TrainSettings
from parity.weights import Row, rows
from parity.weights.adapters import LoraConfig, adapter_rows
from parity.weights.classifier import ClassifierConfig, head_rows


def make_optimizer(model: GPTModel, settings: TrainSettings, table: Sequence[Row] | None = None) -> torch.optim.AdamW:
    """Return AdamW (Loshchilov & Hutter 2019); each step sets its learning rate.

    `table` has the rows of the parameters that are trained, by default all of the model's.
    """
    table = rows(model.config) if table is None else table
    decayed = {name for row in table if row.decayed for name in row.names("torch", model.config)}
    trained = weights.shapes(model.config, "torch", table)
    parameters = {name: p for name, p in model.named_parameters() if name in trained}
    groups = [
        {"params": [p for name, p in parameters.items() if name in decayed], "weight_decay": settings.weight_decay},
        {"params": [p for name, p in parameters.items() if name not in decayed], "weight_decay": 0.0},
    ]
    fused = model.tok_emb.weight.device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=fused)


def clip_by_global_norm(gradients: list[Tensor], largest: float) -> Tensor:
    """Scale gradients in place to a global norm of at most `largest`, and return their norm before scaling.

    torch's own clip_grad_norm_ divides by the norm plus 1e-6. On a CPU its norm of tok_emb's gradient, a float32 sum
    of 38.6 million squares, has a relative error of 3e-3; computing the norms of the rows first avoids it.
    """
    row_norms = [torch.linalg.vector_norm(gradient, dim=-1).flatten() for gradient in gradients]
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(norms) for norms in row_norms]))
    torch._foreach_mul_(gradients, torch.clamp(largest / norm, max=1.0))  # 1 where the norm is 0
    return norm


class Applied(nn.Module):
    """A function of an objective, applied to a model; a module, which DistributedDataParallel can wrap."""

    def __init__(self, model: GPTModel, function: Callable[..., Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, *batch: Tensor) -> Tensor:
        return self.function(self.model, *batch)


class InDtype(nn.Module):
    """A module that computes in another dtype than that of its parameters, which are cast at each call."""

    def __init__(self, module: nn.Module, compute_dtype: torch.dtype):
        super().__init__()
        self.inner, self.compute_dtype = module, compute_dtype

    def forward(self, *batch: Tensor) -> Tensor:
        cast = {name: p.to(self.compute_dtype) for name, p in self.inner.named_parameters()}
        return torch.func.functional_call(self.inner, cast, batch)


class Trainer:
    """A model with its optimizer; implements parity.training.trainer.Trainer, which documents the methods.

    Args:
        config: Shape of the model.
        settings: Settings of the run.
        init_from: Weights to start from (see parity.training.initial.weights_folder); by default random weights that
            depend on the settings' seed.
        attention: "explicit", the formula as written in the model, or "sdpa", torch's fused kernel.
        device: Where to train.
        compile: Whether to compile the loss with torch.compile.
        processes: The processes of torchrun (gpt_torch/distributed.py). Each computes its rows of a batch, and the
            gradients are summed over all of them.
        lora: Train adapters with these options, and nothing else. Checkpoints then hold the adapters alone, so a run
            that is resumed needs `init_from` as well.
        table: The rows of the parameters to train (parity/weights/table.py), by default all; a row that is limited to
            some layers trains those alone.
        objective: What to minimize; by default the cross-entropy of the next token, or of the label of a classifier.
        classifier: Train a classifier with these options: the model gets a new head, which is trained as well.
    """

    def __init__(
        self,
        config: GPTConfig,
        settings: TrainSettings,
        init_from: str | Path | None = None,
        attention: str = "explicit",
        device: torch.device | str = "cpu",
        compile: bool = False,
        processes: Processes = ALONE,
        lora: LoraConfig | None = None,
        table: Sequence[Row] | None = None,
        objective: Objective | None = None,
        classifier: ClassifierConfig | None = None,
    ):
        self.config, self.settings, self.device = config, settings, torch.device(device)
        self.processes = processes
        dtype = getattr(torch, settings.dtype)
        self._param_dtype = param_dtype = torch.promote_types(dtype, torch.float32)
        self.lora, self.classifier = lora, classifier
        initial = initial_arrays(config, settings, init_from)
        self.base = Base() if lora is None else base_of(config, initial, init_from)
        model = GPTModel(config, None, attention)
        load_weights(model, *initial)
        del initial
        if lora is not None:
            add_lora(model, lora, settings.seed)
        own: list[Row] = []
        if classifier is not None:
            add_classifier(model, classifier, settings.seed)
            self.config, own = model.config, head_rows(classifier)
        self.stored: Sequence[Row] = [*(rows(self.config) if lora is None else adapter_rows(lora)), *own]
        self.trainable: Sequence[Row] = self.stored if table is None else [*table, *own]
        trained = weights.shapes(self.config, "torch", self.trainable)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.model = model.to(self.device, param_dtype)
        self.optimizer = make_optimizer(self.model, settings, self.trainable)
        default = Objective(summed_loss) if classifier is None else label_objective(classifier)
        self._objective = default if objective is None else objective

        def applied(function: Callable[..., Tensor]) -> nn.Module:
            module = Applied(self.model, function)
            return module if dtype == param_dtype else InDtype(module, dtype)

        loss = applied(self._objective.summed_loss)
        self._evaluation_loss: Any = torch.compile(loss) if compile else loss
        self._rows = None if self._objective.rows is None else applied(self._objective.rows)
        self._training_loss = self._evaluation_loss
        if processes.count > 1:
            self._training_loss = DistributedDataParallel(self._evaluation_loss)

    def local_slice(self, size: int) -> slice:
        share = size // self.processes.count
        return slice(self.processes.index * share, (self.processes.index + 1) * share)

    def to_device(self, inputs: np.ndarray, targets: np.ndarray, *more: np.ndarray) -> tuple[Tensor, ...]:
        self._objective.check_batch(self.config, inputs, targets)

        def copy(array: np.ndarray) -> Tensor:
            tensor = torch.from_numpy(array)
            tensor = tensor.to(self._param_dtype if tensor.is_floating_point() else torch.int64)
            if self.device.type == "cuda":  # pinned memory is copied while the GPU computes
                tensor = tensor.pin_memory()
            return tensor.to(self.device, non_blocking=True)

        return tuple(map(copy, (inputs, targets, *more)))

    def train_step(self, batch: Sequence[Tensor], lr: float, step: int) -> dict[str, Tensor]:
        if self.config.drop_rate or (self.lora is not None and self.lora.dropout):
            seeds = [self.settings.seed, step, self.processes.index]
            torch.manual_seed(int(np.random.SeedSequence(seeds).generate_state(1)[0]))
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        micro_batches = list(zip(*batch, strict=True))
        count = all_sum(self._objective.n_terms(batch[1]))
        loss = torch.zeros((), device=self.device)
        for number, micro_batch in enumerate(micro_batches, 1):
            # DistributedDataParallel averages the gradients over the processes, in the last backward pass. They
            # should be summed, so the loss is multiplied by the number of processes.
            with self._gradient_sync(number == len(micro_batches)):
                micro_loss = self._training_loss(*micro_batch) / count
                (micro_loss * self.processes.count).backward()
            loss = loss + micro_loss.detach()
        loss = all_sum(loss)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = clip_by_global_norm(gradients, self.settings.clip)
        if torch.isfinite(loss) and torch.isfinite(norm):  # otherwise the step is skipped
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.model.eval()
        return {"loss": loss, "grad_norm": norm}

    def _gradient_sync(self, enabled: bool) -> contextlib.AbstractContextManager:
        if isinstance(self._training_loss, DistributedDataParallel) and not enabled:
            return self._training_loss.no_sync()
        return contextlib.nullcontext()

    @torch.no_grad()
    def evaluate_batch(self, batch: Sequence[Tensor]) -> Tensor:
        return all_sum(self._evaluation_loss(*batch))

    @torch.no_grad()
    def evaluate_rows(self, batch: Sequence[Tensor]) -> np.ndarray:
        assert self._rows is not None, "the objective has no rows"
        return all_rows(self._rows(*batch)).cpu().numpy()

    def generate(self, prompts: Sequence[Sequence[int]], max_new_tokens: int, **options: Any) -> list[list[int]]:
        return generate(self.model, prompts, max_new_tokens, **options)

    def save(self, folder: Path) -> None:
        if not self.processes.first:
            return
        names = weights.shapes(self.config, "torch", self.stored)
        parameters = dict(self.model.named_parameters())
        moments_size = 2 * sum(p.nbytes for p in parameters.values() if p.requires_grad)
        checkpoints.require_space(folder, sum(parameters[name].nbytes for name in names) + moments_size)
        if self.classifier is not None:
            save_classifier(self.model, folder, *self.base)
        elif self.lora is None:
            save_weights(self.model, folder)
        else:
            save_adapter(self.model, folder, *self.base)
        step, moments = self._moments()
        converted = {
            moment: dict(weights.convert(arrays, "torch", "huggingface", self.config, table=self.trainable))
            for moment, arrays in moments.items()
        }
        optimizer_state.write_optimizer(folder, step, converted)

    def restore(self, folder: Path) -> None:
        if self.lora is not None:
            check_base(folder, self.lora, self.base)
        check_classifier(folder, self.classifier)
        stored = optimizer_state.read(folder, self.config, self.stored, self.trainable)
        copy_arrays(self.model, stored.arrays["parameters"], stored.formats["parameters"], str(folder), self.stored)
        moments = {moment: stored.converted(moment, "torch", self.config) for moment in optimizer_state.MOMENTS}
        # The optimizer numbers its parameters across its groups.
        name_of = {parameter: name for name, parameter in self.model.named_parameters()}
        names = [name_of[p] for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            number: {"step": torch.tensor(float(stored.step))}
            # The fused optimizer requires contiguous moments.
            | {moment: torch.tensor(arrays[name]).contiguous() for moment, arrays in moments.items()}
            for number, name in enumerate(names)
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})

    def _moments(self) -> tuple[int, dict[str, dict[str, np.ndarray]]]:
        """Return the number of updates, and {moment: {parameter: array}}, with zeros before the first update."""
        moments: dict[str, Any] = {moment: {} for moment in optimizer_state.MOMENTS}
        step = 0
        for name, parameter in self.model.named_parameters():
            if not parameter.requires_grad:
                continue
            state = self.optimizer.state.get(parameter) or {}
            step = int(state.get("step", 0))
            for moment in optimizer_state.MOMENTS:
                moments[moment][name] = state.get(moment, torch.zeros_like(parameter)).cpu().numpy()
        return step, moments
