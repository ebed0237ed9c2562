"""A random number generator for kernels: reproducible, two instructions a bit, good enough to draw samples."""

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel

SEED = 0x9E3779B97F4A7C15


@kernel
def random_below(state: npt.NDArray[np.void], below: int) -> int:
    """xorshift64 (Marsaglia 2003) on `state[0].seed`, which is not 0."""
    x = state[0].seed
    x ^= x << np.uint64(13)
    x ^= x >> np.uint64(7)
    x ^= x << np.uint64(17)
    state[0].seed = x
    return int((x >> np.uint64(11)) % np.uint64(below))
