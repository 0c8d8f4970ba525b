"""Which process may write a mirrored run: the one that came last.

A machine that was taken away may come back, or may never have stopped, while another one continues its run. Each
process that begins to write makes the object lease/NNNNNN.json with the next number, which only one process can do, and
may write as long as no lease has a higher number. It looks before each change, and renews its lease, so that a process
that comes later can tell whether this one is still at work.
"""

import json
import os
import platform
import time
from typing import NamedTuple

from parity.errors import InputError
from parity.storage.json import as_object, get_entry, parse
from parity.storage.remote import MissingError, Remote

RENEWAL_SECONDS = 60
"""How often a lease is renewed, at least."""
_FOLDER = "lease/"
_TRIES = 20


class SupersededError(InputError):
    """A process that came later writes the mirrored run now."""


class Holder(NamedTuple):
    """The process that holds a lease."""

    owner: str
    """Process number and machine."""
    age: float
    """Seconds since it renewed the lease, by the clocks of both machines."""
    ended: bool
    """Whether it has said that it will write no more."""

    @property
    def is_active(self) -> bool:
        return not self.ended and self.age < 3 * RENEWAL_SECONDS


class Lease:
    """The right to write the objects at an address, until another process takes it.

    Args:
        remote: The objects.
    """

    def __init__(self, remote: Remote):
        self._remote, self._number = remote, 0
        self.owner = f"process {os.getpid()} on {platform.node()}"

    def take(self) -> Holder | None:
        """Take the lease, whoever has it, and return its former holder, if there was one.

        Raises:
            InputError: If other processes take it at the same moment, again and again.
        """
        for _ in range(_TRIES):
            numbers = self._numbers()
            newest = max(numbers, default=0)
            try:
                self._remote.create(_name(newest + 1), self._content())
            except FileExistsError:
                continue
            self._number = newest + 1
            for number in numbers:
                if number < newest:
                    self._remote.remove(_name(number))
            return self._holder(newest) if newest else None
        raise InputError(f"{self._remote.address}: other processes keep taking the lease of this run; try again")

    def check(self) -> None:
        """Raise SupersededError if another process has taken the lease."""
        newest = max(self._numbers(), default=0)
        if newest > self._number:
            holder = self._holder(newest)
            who = "another process" if holder is None else holder.owner
            raise SupersededError(f"{self._remote.address} is now written by {who}, which started later")

    def renew(self, ended: bool = False) -> None:
        """Record that this process still writes, or that it has ended; raises SupersededError like check()."""
        self.check()
        self._remote.write(_name(self._number), self._content(ended))

    def _content(self, ended: bool = False) -> bytes:
        return json.dumps({"owner": self.owner, "renewed": int(time.time()), "ended": ended}).encode()

    def _holder(self, number: int) -> Holder | None:
        """Return what a lease says, or None if it is missing or damaged: its number alone decides who writes."""
        name = _name(number)
        try:
            content = self._remote.read(name)
        except MissingError:
            return None
        try:
            entries = as_object(parse(content, name), name)
            renewed = get_entry(entries, "renewed", int, name)
            owner, ended = get_entry(entries, "owner", str, name), get_entry(entries, "ended", bool, name)
        except InputError:
            return None
        return Holder(owner, time.time() - renewed, ended)

    def _numbers(self) -> list[int]:
        names = (name.removeprefix(_FOLDER).removesuffix(".json") for name in self._remote.list(_FOLDER))
        return [int(name) for name in names if name.isascii() and name.isdecimal() and len(name) < 10]


def _name(number: int) -> str:
    return f"{_FOLDER}{number:06d}.json"
