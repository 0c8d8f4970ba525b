"""How a signal stops a run: after the step at hand, and after a save."""

import signal


class StopRequest:
    """Receive SIGINT (Ctrl-C), SIGTERM and SIGHUP (the terminal was closed).

    The first signal stops the run after a save, a second one stops it at once. If SIGHUP was ignored, as under nohup,
    it stays ignored.
    """

    def __init__(self) -> None:
        self.received = 0
        """Number of the first signal, or 0."""

    def __enter__(self) -> "StopRequest":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self._before = {number: signal.signal(number, self._receive) for number in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: object) -> None:
        if self.received:
            raise KeyboardInterrupt
        self.received = number
