"""What is remembered of evicted blocks: a bounded, set-associative table of fingerprints.

A ghost is a key's fingerprint with a few words of history. It serves no data; it tells a policy that a block which
becomes resident is an old acquaintance. Four ghosts share a set; a new one takes the place of the oldest, so memory
is bounded and what is forgotten is the oldest. A foreign fingerprint (one lookup in 16,000) can mislead a policy,
never a reader.
"""

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel

WAYS = 4

GHOST = np.dtype(
    [
        ("time", np.float64),  # on the policy's clock
        ("gap", np.float32),  # mean time between its uses
        ("tag", np.uint16),  # fingerprint; 0: empty
        ("uses", np.uint8),
        ("kind", np.uint8),
    ],
    align=True,
)

Ghosts = npt.NDArray[np.void]


def new_ghosts(room: int) -> Ghosts:
    """A table for `room` ghosts, rounded up to a power of two; 16 bytes each."""
    return np.zeros(1 << max(4, (room - 1).bit_length()), GHOST)


@kernel
def _set_of(ghosts: Ghosts, key0: np.uint64) -> int:
    # Bits that the index's own table does not use first.
    return int((key0 >> np.uint64(32)) & np.uint64(len(ghosts) // WAYS - 1)) * WAYS


@kernel
def _tag_of(key1: np.uint64) -> np.uint16:
    return np.uint16((key1 >> np.uint64(16)) & np.uint64(0xFFFF) | np.uint64(1))


@kernel
def find_ghost(ghosts: Ghosts, key0: np.uint64, key1: np.uint64) -> int:
    """Where the key's ghost stands, or -1."""
    first = _set_of(ghosts, key0)
    tag = _tag_of(key1)
    for at in range(first, first + WAYS):
        if ghosts[at].tag == tag:
            return at
    return -1


@kernel
def add_ghost(ghosts: Ghosts, key0: np.uint64, key1: np.uint64, time: float, gap: float, uses: int, kind: int) -> int:
    """Remembers a key and says where: over its old ghost, in an empty place or over the oldest of its set."""
    first = _set_of(ghosts, key0)
    tag = _tag_of(key1)
    place = first
    for at in range(first, first + WAYS):
        if ghosts[at].tag == tag or ghosts[at].tag == 0:
            place = at
            break
        if ghosts[at].time < ghosts[place].time:
            place = at
    ghosts[place].tag = tag
    ghosts[place].time = time
    ghosts[place].gap = gap
    ghosts[place].uses = uses
    ghosts[place].kind = kind
    return place


@kernel
def drop_ghost(ghosts: Ghosts, at: int) -> None:
    ghosts[at].tag = 0
