"""Which instance may hold a prompt, guessed from where prompts that begin alike were sent."""

from bisect import bisect_right
from typing import Final

import xxhash

#: Pieces of a prompt's bytes: so large at first, doubled after so many, up to so large.
_FIRST: Final = 512
_ALIKE: Final = 16
_LARGEST: Final = 8192
#: Pieces remembered, and instances of each: the latest ones.
_ROOM: Final = 1 << 17
_SENT_TO: Final = 4

#: Where pieces end, the same in all prompts; as many as the longest one so far has had.
_ends: list[int] = [_FIRST]

#: Of each piece the digest of everything up to its end.
Pieces = tuple[int, ...]


def pieces(prompt: bytes) -> Pieces:
    """A rest that fills no piece is left out."""
    found, at, digest = [], 0, 0
    for end in _ends[: _count(len(prompt))]:
        digest = xxhash.xxh3_64_intdigest(prompt[at:end], digest)
        found.append(digest)
        at = end
    return tuple(found)


def _count(size: int) -> int:
    """How many pieces so many bytes have."""
    while _ends[-1] <= size:
        _ends.append(_ends[-1] + min(_FIRST << (len(_ends) // _ALIKE), _LARGEST))
    return bisect_right(_ends, size)


class Guesses:
    """Needs neither tokenizer nor events. Bounded: what was sent the longest ago goes, half at once. For one thread."""

    def __init__(self, room: int = _ROOM) -> None:
        self._half = room // 2
        self._late: dict[int, tuple[str, ...]] = {}
        self._early: dict[int, tuple[str, ...]] = {}

    def held(self, prompt: Pieces) -> dict[str, int]:
        """By instance, the bytes from the prompt's start that were sent there before."""
        early, found = self._early, dict[str, int]()
        reached: tuple[str, ...] = ()
        last: tuple[str, ...] | None = ()
        for at, names in enumerate(map(self._late.get, prompt)):
            if names is last and names is not None:  # as a rule: what begins alike was sent alike, and told at once
                continue
            last = names
            here = early.get(prompt[at], ()) if names is None else names
            if at == 0:
                reached = here
            elif here != reached:
                for name in reached:
                    if name not in here:
                        found[name] = _ends[at - 1]
                reached = tuple([name for name in reached if name in here])
            if not reached:
                return found
        for name in reached:
            found[name] = _ends[len(prompt) - 1]
        return found

    def sent(self, prompt: Pieces, instance: str) -> None:
        late, early = self._late, self._early
        last: tuple[str, ...] = ()
        told: tuple[str, ...] = (instance,)
        for digest, names in zip(prompt, map(late.get, prompt), strict=True):
            if names is None:
                names = early.get(digest, ())
            if names is not last and names != last:
                last, told = names, (instance, *[name for name in names if name != instance])[:_SENT_TO]
            late[digest] = told
        if len(late) > self._half:
            self._early, self._late = late, {}

    def forget(self, instance: str) -> None:
        """Costs a look at everything that is remembered."""
        for sent in (self._late, self._early):
            for digest in [digest for digest, names in sent.items() if instance in names]:
                sent[digest] = tuple(name for name in sent[digest] if name != instance)
