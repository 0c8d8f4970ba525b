"""Sampling noise: one uniform for each (seed, row, position), the same for both backends.

Source: Salmon et al. 2011, "Parallel Random Numbers: As Easy as 1, 2, 3" (Philox), as in NumPy.
"""

import numpy as np


def uniforms(seed: int, rows: np.ndarray, starts: np.ndarray, count: int) -> np.ndarray:
    """Uniforms float32 [len(rows), count] in [0, 1): row r's are for positions starts[r] onwards.

    Multiples of 2**-24, so that float32 and float64 models compare against the same numbers. The
    number for (seed, row, position) does not depend on what else is asked for.
    """
    drawn = np.empty((len(rows), count), np.float32)
    for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
        generator = np.random.Generator(np.random.Philox(key=[seed, int(row)]))
        stream = generator.integers(0, 2**24, size=int(start) + count, dtype=np.uint32)
        drawn[i] = stream[int(start) :].astype(np.float32) * np.float32(2**-24)
    return drawn
