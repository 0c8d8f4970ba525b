"""Loading ahead of use, on other threads."""

import collections
import itertools
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def prefetch(load: Callable[[S], T], items: Iterable[S], depth: int = 2, workers: int = 1) -> Generator[T, None, None]:
    """load(item) for each item in order, made on other threads while the earlier ones are used.

    At most `depth` of them wait. An error of load() is raised where its item would have come.
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
