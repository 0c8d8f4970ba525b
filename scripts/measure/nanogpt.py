"""nanoGPT's training run on a CPU: the peer of `benchmark.py run`.

    python scripts/measure/nanogpt.py TEXT --steps 2000 --out FOLDER

What its train.py does, written anew, with config/train_shakespeare_char.py and the options that its README gives for a
CPU: 4 layers of width 128, 12 windows of 64 characters, eager float32, no dropout, no biases; each evaluation takes 20
random batches of either split, and saves if the validation loss has fallen.
"""

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

B, T, D, N_HEAD, N_LAYER = 12, 64, 128, 4, 4
EVAL_BATCHES, EVAL_EVERY = 20, 250


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D, bias=False)
        self.out = nn.Linear(D, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (N_HEAD, -1)).transpose(1, 2) for part in self.qkv(x).split(D, dim=-1))
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(D, bias=False), Attention())
        self.mlp = nn.Sequential(
            nn.LayerNorm(D, bias=False),
            nn.Linear(D, 4 * D, bias=False),
            nn.GELU(),
            nn.Linear(4 * D, D, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + self.mlp(x)


class Model(nn.Module):
    def __init__(self, n_vocab: int):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(n_vocab, D), nn.Embedding(T, D)
        self.blocks = nn.Sequential(*(Block() for _ in range(N_LAYER)), nn.LayerNorm(D, bias=False))
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
        x = self.tokens(inputs) + self.positions(torch.arange(inputs.shape[1]))
        logits = F.linear(self.blocks(x), self.tokens.weight)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Run:
    """A run on the characters of a text; the last tenth of them is for validation."""

    def __init__(self, text: Path, out: Path, threads: int = 0, steps: int = 2000):
        if threads:
            torch.set_num_threads(threads)
        torch.manual_seed(1337)
        characters, ids = np.unique(list(text.read_text(encoding="utf-8")), return_inverse=True)
        self._splits = np.split(ids.astype(np.uint16), [int(0.9 * len(ids))])
        self._model, self._out, self._steps, self._best = Model(len(characters)), out, steps, math.inf
        matrices = [p for p in self._model.parameters() if p.dim() > 1]
        vectors = [p for p in self._model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        self._optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
        self._batch = self._next(0)

    def _next(self, split: int) -> tuple[Tensor, Tensor]:
        ids = self._splits[split]
        starts = torch.randint(len(ids) - T, (B,)).tolist()
        windows = [torch.from_numpy(ids[start : start + T + 1].astype(np.int64)) for start in starts]
        return torch.stack([w[:-1] for w in windows]), torch.stack([w[1:] for w in windows])

    def step(self, number: int) -> float:
        """Make a step; return its loss."""
        progress = max(0, number - 100) / max(1, self._steps - 100)
        decayed = 1e-4 + 0.5 * (1 + math.cos(math.pi * progress)) * (1e-3 - 1e-4)
        for group in self._optimizer.param_groups:
            group["lr"] = 1e-3 * (number + 1) / 101 if number < 100 else decayed
        loss = self._model(*self._batch)
        self._batch = self._next(0)
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return loss.item()

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """Return the mean loss of random batches of both splits."""
        self._model.eval()
        losses = [float(np.mean([self._model(*self._next(s)).item() for _ in range(EVAL_BATCHES)])) for s in (0, 1)]
        self._model.train()
        return losses

    def save(self) -> None:
        self._out.mkdir(parents=True, exist_ok=True)
        state = {"model": self._model.state_dict(), "optimizer": self._optimizer.state_dict()}
        torch.save(state, self._out / "ckpt.pt")

    def slice(self, first: int, count: int) -> dict[str, float]:
        """Make steps, evaluate and save; return the seconds of each."""
        times = [time.perf_counter()]
        for number in range(first, first + count):
            self.step(number)
        for part in (self.evaluate, self.save):
            times.append(time.perf_counter())
            part()
        times.append(time.perf_counter())
        return dict(zip(("steps", "evaluation", "save"), np.diff(times).tolist(), strict=True))

    def whole(self) -> None:
        for number in range(self._steps + 1):
            if number % EVAL_EVERY == 0:
                training, validation = self.evaluate()
                print(f"step {number}: training loss {training:.4f}, validation loss {validation:.4f}")
                if validation < self._best:
                    self._best = validation
                    if number:
                        self.save()
            loss = self.step(number)
            print(f"iteration {number}: loss {loss:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description="nanoGPT's training run on a CPU.")
    parser.add_argument("text", type=Path, help="UTF-8 text to train on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=2000, help="number of optimizer steps")
    parser.add_argument("--threads", type=int, default=0, help="number of threads of torch; by default one per core")
    args = parser.parse_args()
    Run(args.text, args.out, args.threads, args.steps).whole()


if __name__ == "__main__":
    main()
