"""Named activations: the places in a model whose value can be read, replaced or sharded; the same in every backend.

    embed                                    B T D    sum of token and position embedding
    blocks.3.ln_1, blocks.3.ln_2             B T D    inputs of attention and of the MLP
    blocks.3.attn.q, .k, .v                  B T N H
    blocks.3.attn.scores                     B N T S  scaled, before the mask
    blocks.3.attn.pattern                    B N T S  after mask and softmax
    blocks.3.attn.z                          B T N H  values averaged by the pattern
    blocks.3.attn.out, blocks.3.mlp.out      B T D    what a branch adds to the residual stream
    blocks.3.mlp.pre, .post                  B T F    before and after GELU
    blocks.3.resid_mid, .resid_post          B T D    the residual stream after attention and after the MLP
    ln_f                                     B T D    input of the head
    logits                                   B T V

A model calls `tap(name, x)` at each of these places. By default that returns x, and leaves no trace in a compiled
program. Under `probe` the activation is recorded or replaced; under `constraining` it is given a sharding. One call
serves both purposes because both need the same two facts, the name of an activation and its axes, at the same place;
two separate annotations could contradict each other.
"""

from parity.taps.names import AXES, ONLY_EXPLICIT, Patch, activation_names, axes, expand_patches, select
from parity.taps.tapping import (
    Constrain,
    Probe,
    attention,
    constraining,
    layer,
    probe,
    probing,
    register_tracer,
    run,
    tap,
)

__all__ = [
    "AXES",
    "ONLY_EXPLICIT",
    "Constrain",
    "Patch",
    "Probe",
    "activation_names",
    "attention",
    "axes",
    "constraining",
    "expand_patches",
    "layer",
    "probe",
    "probing",
    "register_tracer",
    "run",
    "select",
    "tap",
]
