"""What a compiled program would do on a GPU: its kernels and messages, and an estimate of the time they take.

FLOPs, bytes, calls and messages are facts of the program. Seconds are an estimate from assumed speeds, not a
measurement: nothing runs.
"""

import collections
import dataclasses
import re

from gpt_jax import hlo
from gpt_jax.gpu_targets import GPUS
from gpt_jax.hlo import Computation, Operation, Program
from parity.training.flops import peak_flops

# Assumed fractions of the data sheet's speeds. Products with results of 16 bits take the time of the table of measured
# products that XLA contains, if the program was compiled with collect_cost_model_stats.
_PRODUCTS, _PRODUCTS_TO_FLOAT32, _ATTENTION_FORWARD, _ATTENTION_BACKWARD, _BANDWIDTH = 0.75, 0.6, 0.35, 0.3, 0.85
_KERNEL_SECONDS = 1e-6  # until the next kernel begins, within a CUDA graph
_LINK_BANDWIDTH, _MESSAGE_SECONDS = 400e9, 12e-6  # NVLink, for each device and direction

_FREE = re.compile("parameter|constant|tuple|get-tuple-element|bitcast|after-all|partition-id|opt-barrier|.*-update")
_MESSAGE = re.compile("(all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(-start)?")
# Bytes that each of n devices sends, as a multiple of what it holds before: in a ring, where n > 1.
_SENT = {"all-reduce": lambda n: 2 * (n - 1) / n, "all-gather": lambda n: n - 1, "collective-permute": lambda n: 1}
# {Python function: category of the operations that it asked for}; the innermost function that is listed counts.
CATEGORIES = {
    "head_loss": "loss",
    "LayerNorm.__call__": "LayerNorm",
    "GELU.__call__": "GELU",
    "MultiHeadAttention.__call__": "attention's layouts and biases",
    "FeedForward.__call__": "MLP's biases",
    "TransformerBlock.__call__": "residual stream",
    "Embed.__call__": "embedding",
    "cast": "casts of the weights",
    "GPTModel._layers": "layers' loop",
    "make_train_step.<locals>.train_step.<locals>.micro_batch": "sums over micro-batches",
    "make_train_step.<locals>.train_step": "optimizer",
}


@dataclasses.dataclass
class Kernel:
    """A kernel, a call of a library, or a message."""

    operation: Operation
    category: str
    times: int
    """How often it runs in one call of the program."""
    flops: float
    """FLOPs of the matrix products of one run."""
    nbytes: float
    """Bytes of memory that one run reads and writes, or that a message sends from each device."""
    seconds: float
    """Estimated time of one run."""
    dtypes: str = ""
    """Dtypes of a product: those of its factors and of its result."""
    is_message: bool = False


@dataclasses.dataclass(frozen=True)
class Total:
    calls: int
    flops: float
    nbytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """The kernels of a program, and the time that they are estimated to take."""

    kernels: list[Kernel]
    seconds: float
    """Time of one call, where messages overlap with kernels as far as the program's schedule lets them."""
    host_loops: list[str]
    """Loops whose condition the host reads in each iteration, because their length is unknown."""
    transfers: list[str]
    """Operations that exchange data with the host."""

    def total(self, category: str | None = None, messages: bool = False) -> Total:
        """Return the sums over all kernels, or all messages, of a category."""
        chosen = [k for k in self.kernels if k.is_message == messages and category in (None, k.category)]
        return Total(
            sum(k.times for k in chosen),
            sum(k.times * k.flops for k in chosen),
            sum(k.times * k.nbytes for k in chosen),
            sum(k.times * k.seconds for k in chosen),
        )

    def categories(self, messages: bool = False) -> list[str]:
        """Return the categories of kernels or of messages, the one that takes longest first."""
        names = {k.category for k in self.kernels if k.is_message == messages}
        return sorted(names, key=lambda name: -self.total(name, messages).seconds)

    def products(self) -> dict[str, int]:
        """Return how many products run, by the dtypes of their factors and result: {"bf16 x bf16 -> f32": 1280}."""
        counts: collections.Counter[str] = collections.Counter()
        for kernel in self.kernels:
            if kernel.dtypes:
                counts[kernel.dtypes] += kernel.times
        return dict(counts.most_common())

    def calls(self, target: str) -> int:
        """Return how often a library function runs; `target` is a regular expression for its whole name."""
        return sum(k.times for k in self.kernels if re.fullmatch(target, k.operation.target))


ATTENTION_FORWARD, ATTENTION_BACKWARD = r"__cudnn\$fmha\w*(?<!Backward)", r"__cudnn\$fmha\w*Backward"


def read(program: Program, gpu: str, n_devices: int = 1) -> Reading:
    """Read the kernels and messages of a program.

    Args:
        program: The program.
        gpu: One of GPUS, whose speeds the estimate assumes.
        n_devices: Number of devices that run the program together.
    """
    reader = _Reader(program, gpu, n_devices)
    seconds = reader.walk(program.entry, 1)
    return Reading(reader.kernels, seconds, reader.host_loops, reader.transfers)


class _Reader:
    def __init__(self, program: Program, gpu: str, n_devices: int):
        self.program, self.n_devices = program, n_devices
        self.peak, self.bandwidth = peak_flops(gpu) or 0.0, GPUS[gpu].bandwidth
        self.kernels: list[Kernel] = []
        self.host_loops: list[str] = []
        self.transfers: list[str] = []

    def walk(self, name: str, times: int) -> float:
        """Read a computation that runs `times` times; return the estimated time of one run."""
        computation = self.program.computations[name]
        now = link_free = 0.0  # the time when the kernels so far have ended, and the messages so far
        arrivals: dict[str, float] = {}
        for operation in computation.values():
            kind = operation.kind
            if kind in ("infeed", "outfeed", "send", "recv") or "S(5)" in operation.shape:
                self.transfers.append(operation.name)
            if kind in ("while", "call", "conditional") and operation.called:
                if kind == "conditional" or (kind == "while" and operation.trip_count is None):
                    self.host_loops.append(operation.name)
                count = operation.trip_count or 1
                now += count * self.walk(operation.called, times * count)
            elif kind.endswith("-done"):
                now = max(now, arrivals.get(operation.operands[0], 0.0))
            elif message := self._message(computation, operation, times):
                link_free = max(link_free, now) + message.seconds
                if kind.endswith("-start") and '"is_sync":true' not in operation.attributes:
                    arrivals[operation.name] = link_free
                else:
                    now = link_free
                self.kernels.append(message)
            elif not _FREE.fullmatch(kind):
                kernel = self._kernel(computation, operation, times)
                now += kernel.seconds
                self.kernels.append(kernel)
        return max(now, link_free)

    def _message(self, computation: Computation, operation: Operation, times: int) -> Kernel | None:
        wrapped = operation
        if operation.kind == "async-start" and operation.called:
            wrapped = next(op for op in self.program.computations[operation.called].values() if op.is_root)
        match = _MESSAGE.fullmatch(wrapped.kind)
        if match is None:
            return None
        n = hlo.group_size(wrapped, self.n_devices)
        held = sum(hlo.n_bytes(computation[operand].shape) for operand in operation.operands)
        sent = held * (_SENT.get(match[1], lambda n: (n - 1) / n)(n) if n > 1 else 0)
        seconds = sent / _LINK_BANDWIDTH + _MESSAGE_SECONDS
        return Kernel(operation, match[1], times, 0, sent, seconds, is_message=True)

    def _kernel(self, computation: Computation, operation: Operation, times: int) -> Kernel:
        flops, nbytes = 0.0, 0.0 + hlo.n_bytes(operation.shape, *(computation[x].shape for x in operation.operands))
        category, speed, dtypes = self._category(operation), _PRODUCTS, ""
        if "__cudnn$fmha" in operation.target:
            B, T, N, H = hlo.shapes(computation[operation.operands[0]].shape)[0].axes
            backward = re.fullmatch(ATTENTION_BACKWARD, operation.target)
            speed = _ATTENTION_BACKWARD if backward else _ATTENTION_FORWARD
            flops = (5 if backward else 2) * B * N * T * T * H  # half of all pairs of positions; see the causal mask
            category = "attention"
        elif operation.target.startswith("__cublas"):
            flops, dtypes = hlo.product_flops(computation, operation), _dtypes(computation, operation)
        elif operation.kind == "fusion" and operation.called:
            fused = self.program.computations[operation.called]
            flops, nbytes = hlo.fusion_cost(fused)
            dtypes = next((_dtypes(fused, dot) for dot in fused.values() if dot.kind == "dot"), "")
        elif operation.kind == "dot":
            flops, dtypes = hlo.product_flops(computation, operation), _dtypes(computation, operation)
        if dtypes:
            category = "loss: products" if category == "loss" else "products"
            if dtypes.endswith("f32"):
                speed = _PRODUCTS_TO_FLOAT32
        computing = flops / (speed * self.peak)
        table = re.search(r'"exec_time_us":([\d.e+-]+)', operation.attributes)
        if table and dtypes.endswith(" bf16") and operation.target:
            computing = float(table[1]) * 1e-6
        seconds = max(computing, nbytes / (_BANDWIDTH * self.bandwidth)) + _KERNEL_SECONDS
        return Kernel(operation, category, times, flops, nbytes, seconds, dtypes)

    def _category(self, operation: Operation) -> str:
        functions = self.program.functions(operation)
        if not functions and operation.called:  # XLA made this kernel of several
            operations = self.program.computations[operation.called].values()
            functions = next((names for op in reversed(operations) if (names := self.program.functions(op))), ())
        return next((CATEGORIES[name] for name in functions if name in CATEGORIES), "other")


def _dtypes(computation: Computation, operation: Operation) -> str:
    factors = [hlo.shapes(computation[operand].shape)[0].dtype for operand in operation.operands[:2]]
    return f"{' x '.join(factors)} -> {hlo.shapes(operation.shape)[0].dtype}"
