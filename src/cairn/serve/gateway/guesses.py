"""Which instance may hold a prompt, guessed from where prompts that begin alike were sent."""

from collections import OrderedDict
from typing import Final

import xxhash

#: Pieces of a prompt's bytes: so large at first, doubled after so many, up to so large.
_FIRST: Final = 512
_ALIKE: Final = 16
_LARGEST: Final = 8192
#: Pieces remembered, and instances of each: the latest ones.
_ROOM: Final = 1 << 17
_SENT_TO: Final = 4

Pieces = tuple[tuple[int, int], ...]


def pieces(prompt: bytes) -> Pieces:
    """(digest of everything up to here, bytes up to here), piece by piece; a rest that fills none is left out."""
    found, whole = list[tuple[int, int]](), len(prompt)
    at, size, digest, alike = 0, _FIRST, 0, 0
    while (end := at + size) <= whole:
        digest = xxhash.xxh3_64_intdigest(prompt[at:end], digest)
        found.append((digest, end))
        at, alike = end, alike + 1
        if alike == _ALIKE:
            alike, size = 0, min(2 * size, _LARGEST)
    return tuple(found)


class Guesses:
    """Needs neither tokenizer nor events. Bounded; what was sent the longest ago goes first. For one thread."""

    def __init__(self, room: int = _ROOM) -> None:
        self._room = room
        self._sent: OrderedDict[int, tuple[str, ...]] = OrderedDict()

    def held(self, prompt: Pieces) -> dict[str, int]:
        """By instance, the bytes from the prompt's start that were sent there before."""
        found: dict[str, int] = {}
        reached = last = self._sent.get(prompt[0][0], ()) if prompt else ()
        before = 0
        for digest, end in prompt if reached else ():
            names = self._sent.get(digest, ())
            if names != last:  # nearly never: what begins alike was sent alike
                found |= {name: before for name in reached if name not in names}
                reached, last = tuple(name for name in reached if name in names), names
                if not reached:
                    return found
            before = end
        return found | dict.fromkeys(reached, before)

    def sent(self, prompt: Pieces, instance: str) -> None:
        sent, last = self._sent, tuple[str, ...]()
        told: tuple[str, ...] = (instance,)
        for digest, _ in reversed(prompt):  # the end goes before what it hangs from
            names = sent.get(digest, ())
            if names != last:  # nearly never: what begins alike was sent alike
                last, told = names, (instance, *[name for name in names if name != instance])[:_SENT_TO]
            sent[digest] = told
            sent.move_to_end(digest)
        while len(sent) > self._room:
            sent.popitem(last=False)

    def forget(self, instance: str) -> None:
        """Costs a look at everything that is remembered."""
        for digest in [digest for digest, names in self._sent.items() if instance in names]:
            names = tuple(name for name in self._sent[digest] if name != instance)
            if names:
                self._sent[digest] = names
            else:
                del self._sent[digest]
