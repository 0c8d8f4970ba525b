"""A server under many clients, of which a third leave in the middle of their answers: is every answer right, and does
the server keep memory, threads and open files?"""

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, NamedTuple

from measure.report import Measurement
from measure.timing import Timings
from parity.errors import InputError

CLEAR = 1e-3
"""Requests count whose most likely tokens are more likely than the second ones by so many nats: in batches of other
sizes, rounding could exchange two tokens that are closer."""
N_DISTINCT = 24
TIMEOUT = 600


Expected = tuple[dict[str, Any], str]
"""A request, and the text of its answer."""


class Resources(NamedTuple):
    """What a process occupies; zeros where there is no /proc."""

    memory: int
    """Resident bytes."""
    peak: int
    threads: int
    files: int


def resources(pid: int) -> Resources:
    """Return what a process occupies now."""
    folder = Path("/proc") / str(pid)
    if not folder.exists():
        return Resources(0, 0, 0, 0)
    status = (folder / "status").read_text()

    def number(name: str) -> int:
        found = re.search(rf"{name}:\s+(\d+)", status)
        return int(found[1]) if found else 0

    return Resources(
        1024 * number("VmRSS"), 1024 * number("VmHWM"), number("Threads"), len(list((folder / "fd").iterdir()))
    )


class Client(threading.Thread):
    """Asks one request after another until a time, and until it had an answer; leaves every third in the middle.

    A request that is refused because too many wait is repeated.
    """

    def __init__(self, number: int, address: str, model: str, expected: Sequence[Expected], end: float):
        super().__init__()
        self._number, self._address, self._model = number, address, model
        self._expected, self._end = expected, end
        self.counts: Counter[str] = Counter()
        self.seconds: list[float] = []
        self.wrong: list[str] = []

    def run(self) -> None:
        turn = self._number
        while time.monotonic() < self._end or turn == self._number:
            request, text = self._expected[turn % len(self._expected)]
            try:
                turn += self._ask(request, text, is_streamed=turn % 2 == 0, leaves=turn % 3 == 0)
            except (OSError, ValueError, KeyError) as error:
                self.counts["failed"] += 1
                self.wrong.append(f"{type(error).__name__}: {error}")
                turn += 1

    def _ask(self, request: dict[str, Any], text: str, is_streamed: bool, leaves: bool) -> bool:
        """Send a request; return whether there was an answer to it."""
        begin = time.monotonic()
        connection = HTTPConnection(self._address, timeout=TIMEOUT)
        try:
            body = {"model": self._model, **request, "stream": is_streamed or leaves}
            connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            if response.status == 429:
                response.read()
                self.counts["busy"] += 1
                time.sleep(float(response.getheader("Retry-After", "1")))
                return False
            if response.status != 200:
                self.counts["failed"] += 1
                self.wrong.append(f"{response.status}: {response.read(300)!r}")
                return True
            if leaves:
                response.readline()
                self.counts["left"] += 1
                return True
            answer = _streamed(response) if is_streamed else json.loads(response.read())["choices"][0]["text"]
        finally:
            connection.close()
        self.seconds.append(time.monotonic() - begin)
        self.counts["right" if answer == text else "wrong"] += 1
        if answer != text:
            self.wrong.append(f"{request['prompt'][:40]!r}: {answer!r} instead of {text!r}")
        return True


def _streamed(response: Any) -> str:
    texts = []
    while line := response.readline():
        if line.startswith(b"data: {"):
            event = json.loads(line[6:])
            texts += [choice["text"] for choice in event["choices"]]
    return "".join(texts)


def under_load(
    title: str,
    address: str,
    model: str,
    pid: int,
    candidates: Sequence[dict[str, Any]],
    n_clients: int,
    seconds: float,
) -> Measurement:
    """Measure a server under load.

    Args:
        title: Title of the result.
        address: host:port of the server.
        model: Name of the model for requests.
        pid: The server's process.
        candidates: Requests without sampling; those whose tokens are clearly the most likely ones are used.
        n_clients: Number of clients.
        seconds: How long they ask.

    Returns:
        The seconds of the answers that were waited for, with everything else in the notes.

    Raises:
        InputError: If an answer is wrong or missing; the message has the first.
    """
    expected = _expected(address, model, candidates)
    _run(address, model, expected, n_clients, min(5.0, seconds))  # warms up
    before = _idle(address, pid)
    clients = _run(address, model, expected, n_clients, seconds)
    after = _idle(address, pid, before.files)
    counts = sum((client.counts for client in clients), Counter())
    if wrong := [text for client in clients for text in client.wrong]:
        raise InputError(f"{title}: {len(wrong)} answers are wrong or missing, the first: {wrong[0]:.500}")
    notes = [
        f"{counts['right']:,} answers, all of them right; {counts['left']:,} clients left in the middle, "
        f"{counts['busy']:,} answers were 429",
        f"Before and after: {before.memory / 1e6:,.0f} and {after.memory / 1e6:,.0f} MB, {before.threads} and "
        f"{after.threads} threads, {before.files} and {after.files} open files",
    ]
    timings = Timings([second for client in clients for second in client.seconds], after.peak, "cpu")
    return Measurement(title, "answer", 1, "answers of a client", {model: timings}, notes)


def _expected(address: str, model: str, candidates: Sequence[dict[str, Any]]) -> list[Expected]:
    """Return requests whose tokens are clear, with the texts of their answers alone."""
    found: list[Expected] = []
    for request in candidates:
        connection = HTTPConnection(address, timeout=TIMEOUT)
        body = json.dumps({"model": model, **request, "logprobs": 2})
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        choice = json.loads(connection.getresponse().read())["choices"][0]
        connection.close()
        tops = [sorted(entries.values())[-2:] for entries in choice["logprobs"]["top_logprobs"]]
        if all(len(top) == 2 and top[1] - top[0] > CLEAR for top in tops):
            found.append((request, choice["text"]))
        if len(found) == N_DISTINCT:
            break
    if not found:
        raise InputError("no request has tokens that are clearly the most likely ones")
    return found


def _run(address: str, model: str, expected: Sequence[Expected], n_clients: int, seconds: float) -> list[Client]:
    end = time.monotonic() + seconds
    clients = [Client(number, address, model, expected, end) for number in range(n_clients)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    return clients


def _idle(address: str, pid: int, most_files: int | None = None) -> Resources:
    """Wait until the server decodes nothing, and its connections are closed; return what it occupies then.

    Connections count as closed when the number of open files is at most `most_files`, or, if that is None, has not
    changed for a second.
    """
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end:
        connection = HTTPConnection(address, timeout=TIMEOUT)
        connection.request("GET", "/health")
        states = json.loads(connection.getresponse().read())["models"].values()
        connection.close()
        if not any(state["running"] or state["waiting"] for state in states):
            return _closed(pid, most_files)
        time.sleep(0.1)
    raise InputError("the server still decodes after all clients have left")


def _closed(pid: int, most_files: int | None) -> Resources:
    end = time.monotonic() + _CLOSING_SECONDS
    last = resources(pid)
    while True:
        time.sleep(1)
        now = resources(pid)
        is_closed = now.files == last.files if most_files is None else now.files <= most_files
        if is_closed or time.monotonic() > end:
            return now
        last = now


_CLOSING_SECONDS = 60
"""An open file that the server keeps for so long after the last request counts as kept."""
