"""All protocols by name."""

from collections.abc import Mapping

from parity.errors import InputError
from parity.evaluation import cbt, core, corpus, hellaswag, lambada, stream
from parity.evaluation.protocol import Protocol

PROTOCOLS: Mapping[str, Protocol] = {
    protocol.name: protocol
    for family in (lambada, hellaswag, stream, cbt, core, corpus)
    for protocol in family.PROTOCOLS
}


def find(name: str) -> Protocol:
    """Return a protocol by its name; raises InputError for an unknown one."""
    if name not in PROTOCOLS:
        raise InputError(f"unknown protocol {name!r:.80}; choose from {', '.join(PROTOCOLS)}")
    return PROTOCOLS[name]
