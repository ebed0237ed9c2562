"""A sink that keeps what it is told in plain dicts: what an index must know, without how."""

from collections.abc import Sequence

from cairn.fleet.base import Cleared, Event, Removed, Source, Stored, Tier

Hash = bytes | int


class Holder:
    """By source: hash -> tiers, and hash -> (parent, tokens, namespace, extra)."""

    def __init__(self) -> None:
        self.held: dict[Source, dict[Hash, set[Tier]]] = {}
        self.blocks: dict[Source, dict[Hash, tuple[Hash | None, tuple[int, ...], bytes, bytes | None]]] = {}
        self.drops: list[Source] = []
        self.ever: set[Hash] = set()

    def apply(self, source: Source, events: Sequence[Event]) -> None:
        for event in events:
            if isinstance(event, Stored):
                self._store(source, event)
            elif isinstance(event, Removed):
                for key in event.hashes:
                    self._remove(source, key, event.tier)
            else:
                assert isinstance(event, Cleared)
                self._forget(source)

    def drop(self, source: Source) -> None:
        self.drops.append(source)
        self._forget(source)

    def hashes(self, source: Source, tier: Tier = Tier.VRAM) -> set[Hash]:
        return {key for key, tiers in self.held.get(source, {}).items() if tier in tiers}

    def _store(self, source: Source, event: Stored) -> None:
        self.ever.update(event.hashes)
        parent, size = event.parent, event.block_tokens
        for i, key in enumerate(event.hashes):
            self.held.setdefault(source, {}).setdefault(key, set()).add(event.tier)
            if event.tokens:
                tokens = tuple(event.tokens[i * size : (i + 1) * size])
                extra = event.extra[i] if event.extra else None
                self.blocks.setdefault(source, {})[key] = (parent, tokens, event.namespace, extra)
            parent = key

    def _remove(self, source: Source, key: Hash, tier: Tier | None) -> None:
        tiers = self.held.get(source, {}).get(key, set())
        tiers -= {tier} if tier is not None else set(Tier)
        if not tiers:
            self.held.get(source, {}).pop(key, None)
            self.blocks.get(source, {}).pop(key, None)

    def _forget(self, source: Source) -> None:
        self.held.pop(source, None)
        self.blocks.pop(source, None)
