"""Weights: THE table of parameters, and every file format it reads and writes."""

from parity.weights.table import (
    FORMATS,
    OUT_HEAD,
    QKV_BIAS,
    ROWS,
    Row,
    check,
    convert,
    initial_weights,
    n_params,
    rows,
    shapes,
    warn_if_not_finite,
)

__all__ = [
    "FORMATS",
    "OUT_HEAD",
    "QKV_BIAS",
    "ROWS",
    "Row",
    "check",
    "convert",
    "initial_weights",
    "n_params",
    "rows",
    "shapes",
    "warn_if_not_finite",
]
