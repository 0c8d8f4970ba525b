"""FLOPs of training per token, and the peak rates of GPUs."""

from parity.config import GPTConfig
from parity.training.settings import TrainSettings
from parity.weights import n_params

UTILIZATION = 0.4
"""Fraction of a GPU's peak rate that training is assumed to reach where nothing has been measured."""

# FLOP/s of dense bfloat16 matmuls with float32 accumulation, from the manufacturers' data sheets.
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
    """Return the model FLOPs of one token's forward and backward pass: 6N + 12LDT.

    N counts the parameters that a token is multiplied with: all but the position table and, if the head is untied,
    the token embedding. Recomputation does not count (Chowdhery et al. 2022, PaLM, appendix B).
    """
    N = n_params(config) - config.n_ctx * config.n_embd
    if not config.tied_head:
        N -= config.n_vocab * config.n_embd  # looked up, not multiplied
    return 6 * N + 12 * config.n_layer * config.n_embd * config.n_ctx


def peak_flops(device: str) -> float | None:
    """Return the peak bfloat16 FLOP/s of a GPU by its reported name, or None if it is unknown."""
    # The longest name that matches counts: "H100 PCIe" rather than "H100".
    known = [name for name in _PEAKS if name in device]
    return _PEAKS[max(known, key=len)] if known else None


def estimated_time(config: GPTConfig, settings: TrainSettings, device: str, n_devices: int = 1) -> str:
    """Return a sentence with the estimated time of a run.

    Args:
        config: The model's configuration.
        settings: Settings of the run.
        device: The name that the GPU reports.
        n_devices: Number of such devices.

    Returns:
        The sentence; empty if the peak rate is not known, as for a CPU or another dtype than bfloat16.
    """
    peak = peak_flops(device)
    if peak is None or settings.dtype != "bfloat16":
        return ""
    step = settings.batch_size * config.n_ctx * flops_per_token(config) / (UTILIZATION * peak * n_devices)
    total = step * settings.steps
    length = f"{total / 3600:,.1f} hours" if total >= 3600 else f"{total / 60:,.1f} minutes"
    return (
        f"{length} for {settings.steps:,} steps of {step:.2g} s, if each GPU reaches {UTILIZATION:.0%} of its peak, "
        f"{peak / 1e12:,.0f} TFLOP/s; an estimate, without compilation and evaluations"
    )
