"""Which codec to store by: as exact as costs no time, and none where that loads faster."""

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

#: Loads that differ by less are as fast as each other: it is what measurements differ by.
_SLACK: Final = 0.05


class Coded(NamedTuple):
    """What storing by a codec makes of bytes. share: stored bytes a byte; decode_s: seconds that decoding a byte of the
    blocks takes, on one thread."""

    share: float
    decode_s: float


def choose_codec(
    choices: Sequence[Coded], size: int, transfer_s: Callable[[int], float], *, within_s: float = 0.0
) -> int:
    """Which of `choices`, the most exact first, for `size` bytes: the first that loads them within `within_s` seconds,
    or as fast as the fastest does.

    transfer_s: seconds that moving so many stored bytes takes. A thread moves an object and then decodes it, as many
    threads at a time as there are; both are measured under that load, so their sum is what one choice costs against
    another.
    """
    seconds = [transfer_s(round(size * one.share)) + size * one.decode_s for one in choices]
    limit = max(within_s, (1 + _SLACK) * min(seconds))
    return next(i for i, taken in enumerate(seconds) if taken <= limit)
