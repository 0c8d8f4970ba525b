"""Weights: the table of parameters, the converter between formats, and the readers and writers of files."""

from parity.weights.adapters import LoraConfig
from parity.weights.classifier import ClassifierConfig
from parity.weights.conversion import convert, warn_if_not_finite
from parity.weights.initial import initial_weights
from parity.weights.table import (
    FORMATS,
    OUT_HEAD,
    QKV_BIAS,
    ROWS,
    Format,
    Row,
    check,
    n_params,
    rows,
    shapes,
)

__all__ = [
    "FORMATS",
    "OUT_HEAD",
    "QKV_BIAS",
    "ROWS",
    "ClassifierConfig",
    "Format",
    "LoraConfig",
    "Row",
    "check",
    "convert",
    "initial_weights",
    "n_params",
    "rows",
    "shapes",
    "warn_if_not_finite",
]
