"""What a benchmark ran on: processor, threads, versions, and what the processor reaches."""

import platform
from pathlib import Path

from measure import peers
from measure.args import Args
from measure.timing import interleave
from parity.doctor import installed
from parity.parts import usable_cores


def describe() -> str:
    """Return one line about processor, Python and frameworks."""
    model = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []:
        if line.startswith("model name"):
            model = line.partition(": ")[2]
            break
    packages = ", ".join(f"{name} {installed(name) or '(not installed)'}" for name in ("jax", "torch", "transformers"))
    return f"{usable_cores()} cores of {model}, Python {platform.python_version()}, {packages}"


def peaks(args: Args) -> str:
    """Measure the speed of large products and of reading memory; return one line."""
    specs = {
        "products in JAX": args.spec(peers.matmul),
        "products in torch": args.spec(peers.torch_matmul, args.threads),
        "reads": args.spec(peers.memory_reads, args.threads),
    }
    amounts = {"reads": peers.READ_BYTES / 1e9}
    timings, _ = interleave(specs, args.rounds, 10)
    rates = []
    for name, of_peer in timings.items():
        amount = amounts.get(name, peers.MATMUL_FLOPS / 1e9)
        slowest, fastest = amount / max(of_peer.seconds), amount / min(of_peer.seconds)
        unit = "GB/s" if name in amounts else "GFLOP/s"
        rates.append(f"{name} {amount / of_peer.median:,.0f} {unit} ({slowest:,.0f} to {fastest:,.0f})")
    return f"This machine, {args.threads} threads: {', '.join(rates)}"
