"""Messages as they wait in a socket, taken all at once: frame behind frame in one piece of memory, by one kernel.

A message costs a call of libzmq's a frame and a copy of its bytes, and nothing in Python: what follows one another is
found, decoded and stored as arrays. The kernel calls the libzmq that pyzmq has loaded.
"""

import ctypes
from itertools import accumulate, pairwise
from typing import Final, NamedTuple, Self

import numpy as np
import zmq
import zmq.asyncio
import zmq.backend.cython._zmq as backend

from cairn.fleet.msgpack import PADDING, Bytes, Payloads, Words, in_a_row
from cairn.fleet.wire import MAX_PAYLOAD
from cairn.jit import call_c, kernel, load_big

#: Messages, and bytes, that are taken at once: between two looks at the event loop, and as much as a core's cache has.
_ROUND: Final = 256
_ROUND_BYTES: Final = 1 << 18

#: Frames of the longest message that says anything: an answer of the replay.
_FRAMES: Final = 4

#: In a sequence's place: what ends a replay. Behind it there is no next one.
END: Final = b"\xff" * 8

_MORE, _NOBLOCK = int(zmq.RCVMORE), int(zmq.NOBLOCK)


class Framed(NamedTuple):
    """A message as it is on the wire, but for the sequence."""

    topic: bytes
    sequence: int
    payload: bytes


class Messages:
    """Messages that came one after the other, in memory that whoever took them may fill again; `kept` has its own.

    bounds [n, 1 + _FRAMES]: where a message's frames part in `memory`. frames [n]: how many there are; 0: more, or more
    bytes than there is room for.
    """

    def __init__(self, memory: Bytes, bounds: Words, frames: Words) -> None:
        self._memory, self._bounds, self._frames = memory, bounds, frames

    @classmethod
    def of(cls, framed: Framed) -> Self:
        """One that came otherwise."""
        parts = framed.topic, framed.sequence.to_bytes(8, "big"), framed.payload
        bounds = np.array([[0, *accumulate(map(len, parts)), 0]], np.int64)
        return cls(in_a_row(parts), bounds, np.array([len(parts)]))

    def __len__(self) -> int:
        return len(self._frames)

    @property
    def fill_a_round(self) -> bool:
        """Whether there may be more where they came from."""
        return len(self) == _ROUND or bool(len(self) and self._bounds[-1, self._frames[-1]] >= _ROUND_BYTES)

    def part(self, first: int, stop: int) -> "Messages":
        """Those from first to stop."""
        return Messages(self._memory, self._bounds[first:stop], self._frames[first:stop])

    def kept(self) -> "Messages":
        """The same in memory of their own; what has it already is not copied again."""
        end = int(self._bounds[-1, self._frames[-1]]) + PADDING if len(self) else len(self._memory)
        if end == len(self._memory):
            return self
        return Messages(self._memory[:end].copy(), self._bounds.copy(), self._frames.copy())

    def parts(self, i: int) -> list[bytes]:
        """The frames of a message; none if there are too many."""
        bounds = self._bounds[i, : 1 + self._frames[i]].tolist()
        return [self._memory[first:stop].tobytes() for first, stop in pairwise(bounds)]

    def framed(self, i: int) -> Framed | None:
        """A batch: topic, sequence and payload; None: something else, as what ends a replay (sequence -1)."""
        parts = self.parts(i)
        if len(parts) != 3 or len(parts[1]) != 8 or parts[1] == END:
            return None
        return Framed(parts[0], int.from_bytes(parts[1], "big"), parts[2])

    def going_on(self, first: int, sequence: int) -> int:
        """How many from `first` on are batches of this sequence, the next, and so on."""
        return _going_on(self._memory, self._bounds, self._frames, first, np.uint64(sequence))

    def payloads(self) -> Payloads:
        """Of batches."""
        return Payloads(self._memory, np.ascontiguousarray(self._bounds[:, 2:4]))


class Inbox:
    """Takes messages from sockets. For one thread; what it has taken stands until the next time, see `Messages.kept`.

    Takes address space for the largest messages there may be, and keeps the memory of the largest that came.
    """

    def __init__(self) -> None:
        self._memory = np.empty(_ROUND_BYTES + _FRAMES * MAX_PAYLOAD + PADDING, np.uint8)
        self._bounds = np.empty((_ROUND, 1 + _FRAMES), np.int64)
        self._frames = np.empty(_ROUND, np.int64)

    def drain(self, socket: "zmq.asyncio.Socket | zmq.Socket[bytes]") -> Messages:
        """Messages that are there now, up to a round; does not wait."""
        count = _drain(*_LIBZMQ, socket.underlying, self._memory, self._bounds, self._frames)
        return Messages(self._memory, self._bounds[:count], self._frames[:count])


def _libzmq() -> tuple[int, int]:
    """Where `zmq_recv` and `zmq_getsockopt` stand in the library that pyzmq uses."""
    library = ctypes.CDLL(backend.__file__)
    receive, option = (ctypes.cast(one, ctypes.c_void_p).value for one in (library.zmq_recv, library.zmq_getsockopt))
    assert receive
    assert option
    return receive, option


_LIBZMQ: Final = _libzmq()


@kernel
def _drain(receive: int, option: int, socket: int, memory: Bytes, bounds: Words, frames: Words) -> int:
    """Fills all three; how many messages there are."""
    base, room = int(np.int64(memory.ctypes.data)), len(memory) - PADDING
    more, size = np.zeros(1, np.int32), np.full(1, 4, np.uint64)
    at = 0
    for message in range(len(frames)):
        if at >= _ROUND_BYTES:
            return message
        count, fits = 0, True
        bounds[message, 0] = at
        while True:
            left = room - at if count < _FRAMES else 0
            length = call_c(receive, socket, base + at, left, _NOBLOCK)
            if length < 0:
                return message  # nothing there; of a message all frames come, or none
            fits = fits and count < _FRAMES and length <= left
            if fits:
                at += length
                count += 1
                bounds[message, count] = at
            call_c(option, socket, _MORE, int(np.int64(more.ctypes.data)), int(np.int64(size.ctypes.data)))
            if not more[0]:
                break
        frames[message] = count if fits else 0
    return len(frames)


@kernel
def _going_on(memory: Bytes, bounds: Words, frames: Words, first: int, sequence: np.uint64) -> int:
    base, at = int(np.int64(memory.ctypes.data)), first
    while at < len(frames) and frames[at] == 3 and bounds[at, 2] - bounds[at, 1] == 8:
        if load_big(base + bounds[at, 1]) != sequence:
            break
        sequence += np.uint64(1)
        at += 1
    return at - first
