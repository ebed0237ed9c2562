"""Which instance may hold a prompt, guessed from where prompts that begin alike were sent.

A prompt's bytes are cut into pieces, and a table remembers of each, by a digest of everything up to its end, where it
was sent. The table is like a processor's cache: sets of four entries, of each set the latest. One kernel looks up all
of a prompt: in Python its pieces were a fifth of what a request costs the gateway.
"""

from typing import Final

import numpy as np
import numpy.typing as npt

from cairn.jit import kernel

#: Bytes of a piece: so many at first, doubled after so many pieces, up to so many.
_FIRST: Final = 512
_ALIKE: Final = 16
_LARGEST: Final = 8192
#: Pieces remembered, and of a set.
_ROOM: Final = 1 << 17
_WAYS: Final = 4

#: Digests of a prompt's pieces, each of everything up to its end [pieces].
Pieces = npt.NDArray[np.uint64]

#: By set and entry the digest, 0: free, and the numbers of the instances it was sent to [sets, _WAYS, 2].
_Table = npt.NDArray[np.uint64]

#: Of an entry's instances, the latest in the lowest bits; 0: none.
_BITS: Final = 16
_SENT_TO: Final = 64 // _BITS
_NUMBER: Final = np.uint64((1 << _BITS) - 1)

_NONE: Final = np.uint64(0)
_ODD: Final = np.uint64(0x9E3779B97F4A7C15)
_HALF: Final = np.uint64(32)


class Guesses:
    """Needs neither tokenizer nor events. Bounded. For one thread."""

    def __init__(self, room: int = _ROOM) -> None:
        self._table: _Table = np.zeros((max(1, room // _WAYS), _WAYS, 2), np.uint64)
        self._numbers: dict[str, int] = {}
        self._names: dict[int, str] = {}
        self._told = np.zeros(2 + 2 * _SENT_TO, np.int64)  # by the kernel, of the latest look

    def look(self, prompt: bytes) -> tuple[Pieces, list[tuple[str, int]]]:
        """The prompt's pieces; a rest that fills none is left out. And instances, with the bytes from its start that
        were sent there before.
        """
        pieces = np.empty(len(prompt) // _FIRST, np.uint64)
        if not len(pieces):
            return pieces, []
        _look(np.frombuffer(prompt, np.uint64, len(prompt) // 8), self._table, pieces, self._told)
        names, (count, end, *reached) = self._names, self._told.tolist()
        held = [(names[reached[i]], reached[i + 1]) for i in range(0, end, 2)]
        return pieces if count == len(pieces) else pieces[:count], held

    def sent(self, pieces: Pieces, instance: str) -> None:
        """A prompt goes there."""
        number = self._numbers.get(instance) or self._number(instance)
        if number:
            _remember(pieces, number, self._table)

    def forget(self, instance: str) -> None:
        """Costs a look at everything that is remembered."""
        if number := self._numbers.pop(instance, 0):
            del self._names[number]
            _forget(self._table, number)

    @classmethod
    def rehearse(cls) -> None:
        """Runs the kernels before anybody waits for them: the first call of one compiles it, for seconds."""
        guesses = cls(_WAYS)
        guesses.sent(guesses.look(bytes(_FIRST))[0], "rehearsal")
        guesses.forget("rehearsal")

    def _number(self, instance: str) -> int:
        """A free one; 0: there is none."""
        number = next((one for one in range(1, len(self._names) + 2) if one not in self._names), 0)
        if number > _NUMBER:
            return 0
        self._numbers[instance], self._names[number] = number, instance
        return number


@kernel
def _digest(words: npt.NDArray[np.uint64], first: int, last: int, before: np.uint64) -> np.uint64:
    """Of words [first:last], a multiple of four, behind what `before` is the digest of. In four lanes, as each step
    waits for the one before it. Whoever makes two prompts that are alike in it has a wrong guess of his own.
    """
    a, b, c, d = before, before ^ _ODD, ~before, ~before ^ _ODD
    for i in range(first, last, 4):
        a, b, c, d = _mixed(a, words[i]), _mixed(b, words[i + 1]), _mixed(c, words[i + 2]), _mixed(d, words[i + 3])
    return max(_mixed(_mixed(_mixed(_mixed(_NONE, a), b), c), d), np.uint64(1))


@kernel
def _mixed(lane: np.uint64, word: np.uint64) -> np.uint64:
    product: np.uint64 = (lane ^ word) * _ODD
    return product ^ (product >> _HALF)


@kernel
def _look(words: npt.NDArray[np.uint64], table: _Table, pieces: Pieces, told: npt.NDArray[np.int64]) -> None:
    """Fills `pieces`, and `told`: how many pieces there are, the length of what follows, and of each instance that the
    prompt's beginning was sent to its number and how far it holds the prompt, in bytes.
    """
    reached = told[2:]
    digest, holders, at, count, found = _NONE, _NONE, 0, 0, 0
    while True:
        end = at + min(_FIRST << (count // _ALIKE), _LARGEST)
        if end > 8 * len(words):
            break
        digest = _digest(words, at // 8, end // 8, digest)
        pieces[count] = digest
        here = _NONE if count and not holders else _sent_to(table, digest)
        if count == 0:
            holders = here
        elif here != holders:
            found, holders = _part(holders, here, at, reached, found)
        at, count = end, count + 1
    found, _ = _part(holders, _NONE, at, reached, found)
    told[0], told[1] = count, found


@kernel
def _part(
    holders: np.uint64, here: np.uint64, at: int, reached: npt.NDArray[np.int64], found: int
) -> tuple[int, np.uint64]:
    """Of `holders` those that are not `here` hold no more than what ends at `at`. Gives how much of `reached` is told
    then, and who goes on.
    """
    on = _NONE
    for place in range(_SENT_TO):
        number = _numbered(holders, place)
        if number and _has(here, number):
            on |= number << np.uint64(place * _BITS)
        elif number:
            reached[found], reached[found + 1] = number, at
            found += 2
    return found, on


@kernel
def _numbered(instances: np.uint64, place: int) -> np.uint64:
    return (instances >> np.uint64(place * _BITS)) & _NUMBER


@kernel
def _has(instances: np.uint64, number: np.uint64) -> bool:
    found = False
    for place in range(_SENT_TO):
        found |= _numbered(instances, place) == number
    return found


@kernel
def _without(instances: np.uint64, number: np.uint64) -> np.uint64:
    """The others, closed up."""
    rest, places = _NONE, 0
    for place in range(_SENT_TO):
        one = _numbered(instances, place)
        if one and one != number:
            rest |= one << np.uint64(places * _BITS)
            places += 1
    return rest


@kernel
def _sent_to(table: _Table, digest: np.uint64) -> np.uint64:
    entries = table[digest % np.uint64(len(table))]
    for way in range(_WAYS):
        if entries[way, 0] == digest:
            return np.uint64(entries[way, 1])
    return _NONE


@kernel
def _remember(pieces: Pieces, number: int, table: _Table) -> None:
    """Each piece comes first in its set, and the instance first in the piece's entry."""
    for digest in pieces:
        entries = table[digest % np.uint64(len(table))]
        way = 0
        while way < _WAYS - 1 and entries[way, 0] != digest:
            way += 1
        before = np.uint64(entries[way, 1]) if entries[way, 0] == digest else _NONE
        for later in range(way, 0, -1):
            entries[later, 0], entries[later, 1] = entries[later - 1, 0], entries[later - 1, 1]
        others = _without(before, np.uint64(number))
        entries[0, 0], entries[0, 1] = digest, (others << np.uint64(_BITS)) | np.uint64(number)


@kernel
def _forget(table: _Table, number: int) -> None:
    for entries in table:
        for way in range(_WAYS):
            entries[way, 1] = _without(entries[way, 1], np.uint64(number))
