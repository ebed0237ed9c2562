"""The fleet index as a dict of dicts: slow, plain, and what the index must equal."""

from collections import Counter
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

from cairn.fleet import Cleared, Event, Removed, Source, Stored, Tier
from cairn.fleet.names import MOST_COPIES

#: A block is what it stands for: (the block before or the namespace, its tokens, its extra content).
Block = tuple[Any, tuple[int, ...], bytes | None]


def blocks_of(root: Any, tokens: Sequence[int], size: int, extra: Sequence[bytes | None] = ()) -> list[Block]:
    found: list[Block] = []
    for i in range(len(tokens) // size):
        before = found[-1] if found else root
        found.append((before, tuple(tokens[i * size : (i + 1) * size]), extra[i] if extra else None))
    return found


class Model:
    """held[source][hash] = (block, tiers). copies[source, hash]: in VRAM beyond the first."""

    def __init__(self) -> None:
        self.held: dict[Source, dict[Any, tuple[Block, set[Tier]]]] = {}
        self.copies: Counter[tuple[Source, Any]] = Counter()
        self.sizes: dict[Source, set[int]] = {}

    def apply(self, source: Source, event: Event) -> None:
        if isinstance(event, Cleared):
            self.drop(source)
        elif isinstance(event, Removed):
            self._remove(source, event)
        elif len(event.tokens):
            self._store(source, event)
        else:
            for name in event.hashes:
                if name in self.held.get(source, {}):
                    self.held[source][name][1].add(event.tier)

    def drop(self, source: Source) -> None:
        for table in (self.held, self.sizes):
            table.pop(source, None)
        for one in [one for one in self.copies if one[0] == source]:
            del self.copies[one]

    def match(self, tokens: Sequence[int], namespace: bytes) -> dict[Source, tuple[list[int], list[int]]]:
        """By source: tokens by tier alone, and through tiers 0..t."""
        sizes = {size for used in self.sizes.values() for size in used}
        chains = {size: blocks_of(namespace, tokens, size) for size in sizes}
        found = {}
        for source, names in self.held.items():
            tiers_of = dict(names.values())
            alone, reach = [0] * 4, [0] * 4
            for size, chain in chains.items():
                held = [*takewhile(bool, map(tiers_of.get, chain))]
                for tier in Tier if held else ():
                    alone[tier] = max(alone[tier], size * _leading(held, {tier}))
                    reach[tier] = max(reach[tier], size * _leading(held, set(list(Tier)[: tier + 1])))
            found[source] = (alone, reach)
        return found

    def _store(self, source: Source, event: Stored) -> None:
        root: Any = event.namespace
        if event.parent is not None:
            parent = self.held.get(source, {}).get(event.parent)
            if parent is None:
                return
            root = parent[0]
        self.sizes.setdefault(source, set()).add(event.block_tokens)
        names = self.held.setdefault(source, {})
        counted = event.copies and event.parent is not None and event.tier is Tier.VRAM
        for name, block in zip(
            event.hashes, blocks_of(root, event.tokens, event.block_tokens, event.extra), strict=True
        ):
            if counted and name in names and names[name][0] == block and Tier.VRAM in names[name][1]:
                self.copies[source, name] = min(MOST_COPIES, self.copies[source, name] + 1)
            self._name(source, name, block, event.tier)

    def _name(self, source: Source, name: Any, block: Block, tier: Tier) -> None:
        names = self.held[source]
        if name in names and names[name][0] == block:
            names[name][1].add(tier)
            return
        names.pop(name, None)  # it means another block now
        self.copies.pop((source, name), None)
        if all(block != other for other, _ in names.values()):  # else it has a name already
            names[name] = (block, {tier})

    def _remove(self, source: Source, event: Removed) -> None:
        names = self.held.get(source, {})
        for name in event.hashes if event.namespace_group is None else ():
            if self.copies[source, name] and event.tier is Tier.VRAM:
                self.copies[source, name] -= 1
            elif name in names:
                tiers = names[name][1]
                tiers -= set(Tier) if event.tier is None else {event.tier}
                if not tiers:
                    del names[name]
                    del self.copies[source, name]


def _leading(held: Sequence[set[Tier]], wanted: set[Tier]) -> int:
    return next((i for i, tiers in enumerate(held) if not tiers & wanted), len(held))
