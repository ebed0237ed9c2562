"""What an engine's block pool holds by its events, in plain dicts: the oracle for an index that follows them."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from cairn.fleet import Cleared, Event, Removed, Source, Stored

Prefix = tuple[int, ...]


class Pool:
    """A sink for one engine without salts, adapters and tiers.

    vLLM does not merge equal blocks: two requests that compute the same prompt at once leave two copies, and so does
    the last block of a prompt that was cached to its end, which is computed again. Each copy is told when it is cached
    and when it goes. So `copies` is what vLLM really holds; `lost` is what it still holds of that although a removal
    was told, and what was stored behind such a block: an index that takes a removal at its word has it no more.
    """

    def __init__(self) -> None:
        self.copies: Counter[Any] = Counter()
        self.lost: set[Any] = set()
        self.prefixes: dict[Any, Prefix] = {}
        self.twins = self.removals = self.drops = 0

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Stored):
                self._stored(event)
            elif isinstance(event, Removed):
                for name in event.hashes:
                    self._removed(name)
            else:
                assert isinstance(event, Cleared)
                self._forget()

    def drop(self, source: Source) -> None:
        self.drops += 1
        self._forget()

    def held(self, prompt: Sequence[int], block: int) -> tuple[int, int]:
        """Leading tokens of a prompt that vLLM holds, and that an index has which takes removals at their word."""
        names = {prefix: name for name, prefix in self.prefixes.items()}
        chain = [names.get(tuple(prompt[:end])) for end in range(block, len(prompt) + 1, block)]
        return (
            block * _leading(chain, lambda name: self.copies[name] > 0),
            block * _leading(chain, lambda name: self.copies[name] > 0 and name not in self.lost),
        )

    def _stored(self, event: Stored) -> None:
        before = () if event.parent is None else self.prefixes[event.parent]
        orphan = event.parent in self.lost
        for i, name in enumerate(event.hashes):
            end = (i + 1) * event.block_tokens
            self.prefixes[name] = before + tuple(event.tokens[:end])
            self.twins += self.copies[name] > 0
            self.copies[name] += 1
            if not orphan:
                self.lost.discard(name)
            elif self.copies[name] == 1:
                self.lost.add(name)

    def _removed(self, name: Any) -> None:
        assert self.copies[name] > 0, "a removal of what is not there"
        self.removals += 1
        self.copies[name] -= 1
        if self.copies[name]:
            self.lost.add(name)
        else:
            self.lost.discard(name)

    def _forget(self) -> None:
        self.copies.clear()
        self.lost.clear()
        self.prefixes.clear()


def _leading(chain: Sequence[Any], holds: Callable[[Any], bool]) -> int:
    return next((i for i, name in enumerate(chain) if not holds(name)), len(chain))
