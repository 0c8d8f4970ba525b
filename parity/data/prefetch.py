"""Load items before they are needed, on other threads."""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(load: Callable[[S], T], items: Iterable[S], depth: int = 2, workers: int = 1) -> Generator[T, None, None]:
    """Yield load(item) for each item in order, loaded on other threads while earlier ones are in use.

    An error that load() raises for an item is raised when that item is due.

    Args:
        load: Function to call on the other threads.
        items: Arguments of the function.
        depth: Largest number of results that are being loaded or waiting.
        workers: Number of threads.
    """
    remaining = iter(items)
    with ThreadPoolExecutor(workers) as pool:
        waiting = collections.deque(pool.submit(load, item) for item in itertools.islice(remaining, depth))
        try:
            while waiting:
                loaded = waiting.popleft().result()
                waiting.extend(pool.submit(load, item) for item in itertools.islice(remaining, 1))
                yield loaded
        finally:
            for future in waiting:
                future.cancel()
