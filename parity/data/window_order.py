"""The order of the windows in an epoch: a shuffled table, or a permutation that is computed where it is needed."""

import functools
from typing import Literal

import numpy as np

WindowOrder = Literal["shuffled", "keyed"]

_ROUNDS = 8
# Words that separate the keys from other random streams of the same seed and epoch.
_STREAM = (0x6B657965, 0x64)


@functools.lru_cache(maxsize=4)
def order(seed: int, epoch: int, count: int) -> np.ndarray:
    """Return the order of `count` windows in an epoch: a permutation of 0..count-1, int64 [count]."""
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(count)


def keyed_order(seed: int, epoch: int, count: int, places: np.ndarray) -> np.ndarray:
    """Return elements of a permutation of 0..count-1 that needs no table.

    It is a Feistel network (Luby and Rackoff, 1988) over the smallest power of two that is not below `count`, with keys
    from (seed, epoch). A number outside of 0..count-1 is permuted again until it is inside ("cycle walking", Black and
    Rogaway, 2002), on average less than twice.

    Args:
        seed: Seed of the order.
        epoch: Number of the epoch, from 0.
        count: Number of windows, at most 2^62.
        places: Which elements: their indices, integers in 0..count-1 [n].

    Returns:
        The windows at these places of the epoch, int64 [n].
    """
    keys = _keys(seed, epoch)
    bits = (count - 1).bit_length()
    windows = np.array(places, np.uint64)
    outside = np.ones(windows.shape, bool)
    while outside.any():
        windows[outside] = _feistel(windows[outside], bits, keys)
        outside = windows >= count
    return windows.astype(np.int64)


def _feistel(numbers: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """Permute the numbers of `bits` bits, uint64 [n]: in turns, each half is changed by a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask, high_mask = (np.uint64((1 << n) - 1) for n in (bits // 2, bits - bits // 2))
    low, high = numbers & low_mask, numbers >> low_bits
    for first, second in keys.reshape(-1, 2):
        high ^= _hash(low ^ first) & high_mask
        low ^= _hash(high ^ second) & low_mask
    return high << low_bits | low


def _hash(x: np.ndarray) -> np.ndarray:
    """Mix the bits of integers, uint64 [n], with the finalizer of MurmurHash3."""
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xFF51AFD7ED558CCD)
    x = (x ^ x >> np.uint64(33)) * np.uint64(0xC4CEB9FE1A85EC53)
    return x ^ x >> np.uint64(33)


@functools.lru_cache(maxsize=16)
def _keys(seed: int, epoch: int) -> np.ndarray:
    return np.random.SeedSequence([seed, epoch, *_STREAM]).generate_state(_ROUNDS, np.uint64)
