"""Copies between one buffer and several, for clients that know only one."""

from collections.abc import Sequence

import numpy as np


def scatter(data: memoryview, parts: Sequence[memoryview]) -> None:
    """Copies data into parts, one after the other, as far as both go. Frees the GIL, as a memoryview does not."""
    source, at = np.frombuffer(data, np.uint8), 0
    for part in parts:
        piece = source[at : at + len(part)]
        np.copyto(np.frombuffer(part, np.uint8)[: len(piece)], piece)
        at += len(piece)
