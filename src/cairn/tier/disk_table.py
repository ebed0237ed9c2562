"""The record table of a cache directory: which block each slot holds, 64 bytes a slot, little-endian.

    bytes  0-15  key            all zero: the slot is empty
          16-31  parent's key, or the namespace for the first block of a chain
          32-47  namespace
          48-55  sequence, growing with every record published
          56-63  checksum over the rest and the slot's number

Records are written with pwrite into the page cache, which outlives the process like a shared mapping would, in a
microsecond beside a slot's write of hundreds; but where a mapping dies of SIGBUS (a bad sector, a file somebody cut
short), and the inference process with it, pwrite returns an error.

Nothing is served because a record says so: a reader still checks the frame in the slot. So a record that reaches the
disk before or after its slot in a power cut is a miss at worst.
"""

import errno
import os
from itertools import pairwise
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.index.slots import SlotIds
from cairn.kv import Keys
from cairn.tier.disk_directory import RECORD_BYTES

_WORDS: Final = RECORD_BYTES // 8
_KEY, _PARENT, _NAMESPACE, _SEQUENCE, _CHECK = slice(0, 2), slice(2, 4), slice(4, 6), 6, 7
_PRIME: Final = np.uint64(0x9E3779B185EBCA87)
_SEED: Final = np.uint64(0xC2B2AE3D27D4EB4F)

Records = npt.NDArray[np.uint64]


def checksums(records: Records, slots: SlotIds) -> npt.NDArray[np.uint64]:
    """The checksum of each record [n, 8] for its slot. Every step is a bijection of the running value, so that a change
    within one 8-byte word is found with certainty, not only very likely."""
    value = (slots.astype(np.uint64) + _SEED) * _PRIME
    for word in range(_CHECK):
        value = (value ^ records[:, word]) * _PRIME
        value ^= value >> np.uint64(32)
    return value


class Recovered(NamedTuple):
    """The sound records of a table, oldest first: keys, parents, namespaces [n, 2], roots [n], slots [n].

    damaged: how many more were neither sound nor empty.
    """

    keys: Keys
    parents: Keys
    namespaces: Keys
    roots: npt.NDArray[np.bool_]
    slots: SlotIds
    damaged: int
    last_sequence: int


def recover(fd: int, slots: int) -> Recovered:
    """Reads the table of `slots` records. Raises OSError; a table cut short has empty records at its end."""
    raw = _read(fd, slots * RECORD_BYTES)
    records = np.frombuffer(raw, "<u8").astype(np.uint64, copy=False).reshape(slots, _WORDS)
    used = np.flatnonzero(records.any(axis=1)).astype(np.int32)
    sound = used[checksums(records[used], used) == records[used, _CHECK]]
    sound = sound[np.argsort(records[sound, _SEQUENCE], kind="stable")]
    kept = records[sound]
    return Recovered(
        keys=np.ascontiguousarray(kept[:, _KEY]),
        parents=np.ascontiguousarray(kept[:, _PARENT]),
        namespaces=np.ascontiguousarray(kept[:, _NAMESPACE]),
        roots=(kept[:, _PARENT] == kept[:, _NAMESPACE]).all(axis=1),
        slots=sound,
        damaged=len(used) - len(sound),
        last_sequence=int(kept[-1, _SEQUENCE]) if len(kept) else 0,
    )


def _read(fd: int, size: int) -> bytearray:
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        got = os.preadv(fd, [view[done : done + (64 << 20)]], done)
        if got == 0:
            break
        done += got
    return data


class RecordTable:
    """The table of the directory's owner. Calls are ordered by the caller; each raises OSError if the system does.

    fd: stays the caller's. next_sequence: above every sequence in the file.
    """

    def __init__(self, fd: int, slots: int, next_sequence: int) -> None:
        self._fd = fd
        self._next = next_sequence
        # Whether a slot's record may be other than empty, so that an empty one is not cleared again.
        self._used = np.ones(slots, np.bool_)

    def clear(self, slots: SlotIds) -> None:
        """Empties the records of slots [n], before anything else is written into these slots."""
        slots = slots[self._used[slots]]
        self._write(slots, np.zeros((len(slots), _WORDS), np.uint64))
        self._used[slots] = False

    def publish(self, slots: SlotIds, keys: Keys, parents: Keys, namespace: bytes) -> None:
        """Records that slots [n] hold keys [n, 2] below parents [n, 2], which are in chain order."""
        records = np.empty((len(slots), _WORDS), np.uint64)
        records[:, _KEY] = keys
        records[:, _PARENT] = parents
        records[:, _NAMESPACE] = np.frombuffer(namespace, np.uint64)
        records[:, _SEQUENCE] = np.arange(self._next, self._next + len(slots), dtype=np.uint64)
        records[:, _CHECK] = checksums(records, slots)
        self._next += len(slots)
        self._used[slots] = True
        self._write(slots, records)

    def _write(self, slots: SlotIds, records: Records) -> None:
        """One call for each run of neighbouring slots, in the order given."""
        data = records.astype("<u8", copy=False).tobytes()
        edges = [0, *(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)]
        for start, stop in pairwise(edges):
            if start < stop:
                run = data[start * RECORD_BYTES : stop * RECORD_BYTES]
                if os.pwrite(self._fd, run, int(slots[start]) * RECORD_BYTES) != len(run):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def sync(self) -> None:
        """Brings the records to the device."""
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Forgets the file: from now on every call that would write raises OSError."""
        self._fd = -1
