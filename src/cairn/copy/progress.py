"""How far a copy has come that goes layer by layer: told by who copies, without the GIL, and read by who follows."""

import time
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel, load_acquire, store_release

#: Words that different threads write stand on cache lines of their own.
_LINE_WORDS = 8

#: Who follows looks again after so long, and the later, the longer he has waited: to wake him by a lock, whoever copies
#: would need the GIL.
_LOOK_S, _LOOK_SHARE = 50e-6, 1 / 64


@kernel
def _least(words: npt.NDArray[np.int64]) -> int:
    least = load_acquire(words.ctypes.data)
    for at in range(_LINE_WORDS, len(words), _LINE_WORDS):
        least = min(least, load_acquire(words.ctypes.data + 8 * at))
    return int(least)


@kernel
def _set(words: npt.NDArray[np.int64], value: int) -> None:
    store_release(words.ctypes.data, value)


class Progress:
    """Of a copy of layers 0..layers - 1, in their order. Thread-safe.

    Whoever copies reports by `groups`, from Python, or by `split`, from kernels, each for its share of every layer. A
    copy ends early when it is to `stop`; so does who waits for it.
    """

    def __init__(self, layers: int) -> None:
        self.layers = layers
        self._reached = 0  # the layer that who follows has come to
        self._stop = np.zeros(1, np.int64)
        self._told = np.zeros(_LINE_WORDS, np.int64)

    @property
    def done(self) -> int:
        """How many leading layers are there. What is read after it is what was copied."""
        return _least(self._told)

    @property
    def stopped(self) -> bool:
        return bool(self._stop[0])

    def stop(self) -> None:
        """Nothing is waited for any more, and the copy ends after the layer under way, or the group. Idempotent."""
        _set(self._stop, 1)

    def split(self, shares: int) -> tuple[int, list[int]]:
        """For kernels: the address of a word that is 0 until they are to stop, and one for each share, where it counts
        the layers that are done (`store_release`). They live as long as this. Called once, before the copy begins.
        """
        self._told = np.zeros(shares * _LINE_WORDS, np.int64)
        return self._stop.ctypes.data, [self._told.ctypes.data + 8 * _LINE_WORDS * i for i in range(shares)]

    def groups(self) -> Iterator[range]:
        """The layers in groups, each of which is there when the next is asked for.

        Each group takes the GIL from the model's thread, some 0.3 ms: so there are as many layers in one as who follows
        still has before him. They are there when he comes to them, if copying a layer takes no longer than computing
        it; if it takes longer, he is always close behind and groups stay small.
        """
        done, size = 0, 1
        while done < self.layers and not self.stopped:
            group = range(done, min(self.layers, done + size))
            yield group
            done = group.stop
            _set(self._told, done)
            size = max(1, done - self._reached)

    def follow(self, layer: int, timeout: float | None = None) -> bool:
        """Who follows has come to the layer: waits until it is there. False if the timeout or `stop` came first."""
        self._reached = layer
        return self.wait(layer + 1, timeout)

    def wait(self, layers: int, timeout: float | None = None) -> bool:
        """As `follow`, until so many are there, for who does not follow."""
        if self.done >= layers:
            return True
        started = time.monotonic()
        waited = 0.0
        while not self.stopped and (timeout is None or waited < timeout):
            pause = max(_LOOK_S, waited * _LOOK_SHARE)
            time.sleep(pause if timeout is None else min(pause, timeout - waited))
            if self.done >= layers:
                return True
            waited = time.monotonic() - started
        return self.done >= layers
