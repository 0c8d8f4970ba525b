"""How much arithmetic a model needs, and what a device could do."""

from parity.config import GPTConfig
from parity.weights import n_params

# Dense bfloat16 products with float32 sums, FLOP/s, from the makers' data sheets; the longest name that fits counts.
_PEAKS = {
    "A100": 312e12,
    "A10G": 70e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H100": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIe": 756e12,
    "H200": 989e12,
    "L4": 121e12,
    "L40S": 362e12,
    "RTX 3090": 71e12,
    "RTX 4090": 165e12,
    "V100": 125e12,
}


def flops_per_token(config: GPTConfig) -> float:
    """Model FLOPs of one token's forward and backward pass: 6N + 12LDT (Chowdhery et al. 2022, appendix B).

    N: parameters that a token is multiplied with, which are all but the position table's. Recomputation does not count.
    """
    N = n_params(config) - config.n_ctx * config.n_embd
    if not config.tied_head:
        N -= config.n_vocab * config.n_embd  # the embedding is looked up
    return 6 * N + 12 * config.n_layer * config.n_embd * config.n_ctx


def peak_flops(device: str) -> float | None:
    """FLOP/s in bfloat16 of a GPU by the name that it gives itself, or None where it is not known."""
    known = [name for name in _PEAKS if name in device]
    return _PEAKS[max(known, key=len)] if known else None
