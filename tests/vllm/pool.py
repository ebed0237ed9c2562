"""What an engine's block pool holds by its events, in plain dicts: the oracle for an index that follows them."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from cairn.fleet import Cleared, Event, Removed, Source, Stored

Prefix = tuple[int, ...]


class Pool:
    """A sink for one engine without salts, adapters and tiers.

    vLLM does not merge equal blocks: two requests that compute the same prompt at once leave two copies, and so does
    the last block of a prompt that was cached to its end, which is computed again. Each copy is told when it is cached
    and when it goes. twins: blocks stored while a copy was there.
    """

    def __init__(self) -> None:
        self.copies: Counter[Any] = Counter()
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

    def held(self, prompt: Sequence[int], block: int) -> int:
        """Leading tokens of a prompt that vLLM holds."""
        names = {prefix: name for name, prefix in self.prefixes.items()}
        for end in range(block, len(prompt) + 1, block):
            if not self.copies[names.get(tuple(prompt[:end]))]:
                return end - block
        return len(prompt) // block * block

    def _stored(self, event: Stored) -> None:
        before = () if event.parent is None else self.prefixes[event.parent]
        for i, name in enumerate(event.hashes):
            end = (i + 1) * event.block_tokens
            self.prefixes[name] = before + tuple(event.tokens[:end])
            self.twins += self.copies[name] > 0
            self.copies[name] += 1

    def _removed(self, name: Any) -> None:
        assert self.copies[name] > 0, "a removal of what is not there"
        self.removals += 1
        self.copies[name] -= 1

    def _forget(self) -> None:
        self.copies.clear()
        self.prefixes.clear()
