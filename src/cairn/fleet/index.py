"""The global block index: events in, and who holds how much of a prompt out."""

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from cairn.errors import InputError
from cairn.fleet.base import Cleared, Event, Removed, Source, Stored, StoredMany
from cairn.fleet.blocks import ALL_TIERS, Chain, new_chain, taken
from cairn.fleet.chains import Hashed, as_hashed, keys_with_extra, root_of, rows_of, rows_told, seed_of
from cairn.fleet.copying import Piece, SourceCopy
from cairn.fleet.holders import sets_used
from cairn.fleet.ledger import Ledger
from cairn.fleet.match import PLANES, Match, planes_of, walk
from cairn.fleet.names import SLOT_BITS, Hashes, hash_of, hashes_of
from cairn.kv import Keys, as_tokens
from cairn.kv.keys import Tokens

#: Blocks that are hashed before anybody is asked whether he holds them; eight times as many each time after.
_PIECE = 512

#: Where prompts without a namespace begin, [1, 2].
_ROOT = seed_of(root_of(b""))


class Stats(NamedTuple):
    """blocks: distinct ones; worker_blocks: pairs of a block and a source that holds it; sets: different sets of
    holders; sources; bytes: memory in use. Since the start, in blocks: evicted; orphans: stored behind a parent that
    the source does not hold; unknown: named in removals and tokenless events but not held; malformed: of events that
    contradict themselves, or of one source or block size too many; doubles: stored by a source that held them under
    another name; uncounted: copies beyond those that are counted, which count as gone too early.
    """

    blocks: int
    worker_blocks: int
    sets: int
    sources: int
    bytes: int
    evicted: int
    orphans: int
    unknown: int
    malformed: int
    doubles: int
    uncounted: int


class FleetIndex:
    """Which source holds which blocks in which tier, by Cairn's own keys over token ids.

    capacity: distinct blocks at most; worker_blocks: pairs of block and source at most. Beyond either those go that
    have been stored, and asked for, the longest ago. sources: at most so many at a time, of 8 block sizes together;
    events of others are not taken in. Memory: about 53 bytes a distinct block and 18 a worker-block, and 32 bytes per
    64 sources for each different set of holders, of which there are at most as many as blocks.

    Thread-safe. Events of one source must come from one thread at a time, in order; those of several may come at once.
    A lookup waits for one batch of changes at most (`storing.BATCH`), however much is being taken in. Nothing raises
    for what events say: what cannot be used is skipped and counted.
    """

    takes_many = True

    def __init__(self, capacity: int = 1 << 22, *, worker_blocks: int = 1 << 27, sources: int = 1 << 14) -> None:
        bounds = (("capacity", capacity, SLOT_BITS), ("worker_blocks", worker_blocks, 31), ("sources", sources, 31))
        for name, value, bits in bounds:
            if not 1 <= value < 1 << bits:
                raise InputError(f"{name}={value}: must be in [1, 2**{bits})")
        self._ledger = Ledger(capacity, worker_blocks, sources)
        self._counts: Counter[str] = Counter()

    def apply(self, source: Source, events: Iterable[Event | StoredMany]) -> None:
        """Takes in what a source said, in order."""
        for event in events:
            if isinstance(event, StoredMany):
                self._stored_many(source, event)
            elif isinstance(event, Stored):
                self._stored(source, event)
            elif isinstance(event, Removed):
                self._removed(source, event)
            elif isinstance(event, Cleared):
                self.drop(source)

    def drop(self, who: Source | str) -> None:
        """A source, or all sources of an instance, hold nothing any more. Costs what they held."""
        with self._ledger.writers:
            known = [one for one in self._ledger.members if one.instance == who]
            for source in [who] if isinstance(who, Source) else known:
                self._ledger.drop(source)

    def sources(self) -> tuple[Source, ...]:
        """All that hold something, those held back too."""
        with self._ledger.writers:
            return tuple(self._ledger.members)

    def show(self, source: Source) -> None:
        """What `restore` has held back counts from now on."""
        with self._ledger.writers:
            self._ledger.show(source)

    def copy(self, source: Source) -> SourceCopy | None:
        """A copy of a source, to be made with `cut`; None: it holds nothing."""
        with self._ledger.writers:
            member = self._ledger.members.get(source)
        return None if member is None else SourceCopy(self._ledger, member)

    def cut(self, source: Source, copy: SourceCopy) -> bool:
        """Takes the moment of a copy; False: the source has been dropped since the copy was begun."""
        with self._ledger.writers:
            member = self._ledger.members.get(source)
            there = member is not None and copy.of(member)
            if there:
                copy.cut()
            return there

    def restore(self, source: Source, sizes: tuple[int, ...], names: int, *, held_back: bool) -> bool:
        """Makes room for a source that is not there, of these block sizes and about so many blocks, for `fill`. False
        if it is there, or if there are too many sources or block sizes. held_back: it does not count until `show`.
        """
        with self._ledger.writers:
            return self._ledger.restore(source, sizes, names, held_back=held_back)

    def fill(self, source: Source, piece: Piece) -> None:
        """Blocks of a source that `restore` has made room for; of one that is gone since nothing is taken in."""
        with self._ledger.writers:
            self._ledger.fill(source, piece)

    @property
    def limits(self) -> tuple[int, int]:
        """Blocks and worker-blocks at most."""
        return self._ledger.limits

    def hashed(self, tokens: Any, namespace: bytes = b"") -> tuple[Hashed, ...]:
        """The keys of a prompt, token ids [n], in each block size that a source uses, for `match`. Raises InputError.

        namespace: as events tell it, see `Stored`.
        """
        ids = as_tokens(tokens)
        return tuple(
            Hashed(size, self._chain(root_of(namespace), rows_of(ids, size)).keys) for size in self._ledger.sizes
        )

    def match(self, prompt: Any, instances: Collection[str] | None = None, namespace: bytes = b"") -> Match:
        """What each source (of these instances) holds of a prompt, in tokens. A source that holds nothing at all, as
        one that was cleared, is not in it.

        prompt: token ids [n], under `namespace`; or what `hashed` gave; or a KeyChain, which must be rooted at
        `root_of(namespace)`: sources of other block sizes then hold nothing. Raises InputError for what are no tokens.
        """
        ready = as_hashed(prompt)
        if ready:
            return self._together([self._walk(keys, size, instances) for size, keys in ready])
        return self.look_up(prompt, instances, namespace)[0]

    def look_up(
        self,
        tokens: Any,
        instances: Collection[str] | None = None,
        namespace: bytes = b"",
        beyond: Callable[[Hashed], bool] | None = None,
    ) -> tuple[Match, tuple[Hashed, ...]]:
        """What `match` says of token ids [n], and their keys, by block size, as far as they were needed for it.

        What must be hashed is hashed piece by piece, as long as anybody holds all of it so far: most of the time goes
        into that, and a prompt that is new to the fleet ends early. beyond: says of a prompt's beginning, which nobody
        holds, that it is wanted all the same. Raises InputError.
        """
        ids, root = as_tokens(tokens), root_of(namespace)
        found = [self._look_up(rows_of(ids, size), root, instances, beyond) for size in self._ledger.sizes]
        return self._together([match for match, _ in found]), tuple(hashed for _, hashed in found)

    def _look_up(
        self, rows: Tokens, root: bytes, instances: Collection[str] | None, beyond: Callable[[Hashed], bool] | None
    ) -> tuple[Match, Hashed]:
        """In one block size, of blocks [n, tokens]."""
        size, chain, done, most = rows.shape[1], new_chain(len(rows)), 0, _PIECE
        while True:
            seed = chain.keys[done - 1 : done] if done else seed_of(root)
            done = self._ledger.follow(chain, rows, done, seed, most)
            hashed = Hashed(size, chain.keys[:done])
            found = self._walk(hashed.keys, size, instances)
            wanted = (found.reach[:, -1] == size * done).any() or (beyond is not None and done and beyond(hashed))
            if done == len(rows) or not wanted:
                return found, hashed
            most *= 8

    def _together(self, found: Sequence[Match]) -> Match:
        """The most that each source holds in any block size."""
        if not found:
            return self._walk(np.empty((0, 2), np.uint64), 1, ())
        best = found[0]
        for one in found[1:]:
            if best.sources != one.sources:  # a source came or went meanwhile: the later is right
                best = one
            else:
                best = Match(one.sources, np.maximum(best.tokens, one.tokens), np.maximum(best.reach, one.reach))
        return best

    def block_tokens(self, source: Source) -> int | None:
        """The smallest block size that a source uses; None while it holds nothing."""
        with self._ledger.writers:
            member = self._ledger.members.get(source)
            return min(member.sizes) if member else None

    def held(self) -> dict[Source, int]:
        """How many blocks each source holds."""
        with self._ledger.writers:
            return {source: member.count for source, member in self._ledger.members.items()}

    def stats(self) -> Stats:
        ledger = self._ledger
        with ledger.writers:
            return Stats(
                blocks=taken(ledger.blocks),
                worker_blocks=ledger.named,
                sets=sets_used(ledger.holders),
                sources=len(ledger.members),
                bytes=ledger.nbytes,
                evicted=ledger.evicted,
                orphans=self._counts["orphans"],
                unknown=self._counts["unknown"],
                malformed=self._counts["malformed"],
                doubles=self._counts["doubles"],
                uncounted=ledger.uncounted,
            )

    def _walk(self, keys: Keys, block_tokens: int, instances: Collection[str] | None) -> Match:
        ledger = self._ledger
        with ledger.lock:
            sources, numbers = ledger.roster()
            if instances is not None:
                wanted = [i for i, source in enumerate(sources) if source.instance in instances]
                sources, numbers = tuple(sources[i] for i in wanted), numbers[wanted]
            live = np.zeros((PLANES, ledger.words), np.uint64)
            np.bitwise_or.at(live[0], numbers >> 6, np.uint64(1) << (numbers & 63).astype(np.uint64))
            live[1:] = live[0]
            ended = np.full((PLANES, 64 * ledger.words), len(keys), np.int32)
            walk(ledger.blocks, ledger.holders, keys, live, ended)
        return Match(sources, *planes_of(ended, numbers, block_tokens))

    def _stored(self, source: Source, event: Stored) -> None:
        count, hashes = len(event.hashes), hashes_of(event.hashes)
        if hashes is None:
            self._miss("malformed", count)
        elif not len(event.tokens):
            with self._ledger.writers:
                self._counts["unknown"] += self._ledger.attach(source, hashes, int(event.tier))
        elif (root := self._root(source, event)) is None:
            self._miss("orphans", count)
        elif (rows := rows_told(event)) is None:
            self._miss("malformed", count)
        elif any(one is not None for one in event.extra):
            keys = keys_with_extra(root, rows, event.extra)
            self._store(source, event, Chain(keys, np.zeros(len(keys), np.uint64)), hashes)
        else:
            self._store(source, event, self._chain(root, rows), hashes)

    def _stored_many(self, source: Source, many: StoredMany) -> None:
        """The same as each of the events by itself."""
        size, singles = many.tokens.shape[1], 0
        if not self._ledger.uses(source, size):
            for event in many.each():
                self._stored(source, event)  # it may be the first of its kind, or none that is taken in
                singles += 1
                if self._ledger.uses(source, size):
                    break
        if singles == len(many.told):
            return
        rest = many.behind(singles) if singles else many
        with self._ledger.writers:
            orphans, doubles = self._ledger.store_many(source, rest, _ROOT)
            self._counts["orphans"] += orphans
            self._counts["doubles"] += doubles

    def _chain(self, root: bytes, rows: Tokens) -> Chain:
        """Of blocks [n, tokens] behind `root`."""
        chain = new_chain(len(rows))
        self._ledger.follow(chain, rows, 0, seed_of(root), len(rows))
        return chain

    def _store(self, source: Source, event: Stored, chain: Chain, hashes: Hashes) -> None:
        copies = event.copies and event.parent is not None
        with self._ledger.writers:
            doubles = self._ledger.store(source, event.block_tokens, chain, hashes, int(event.tier), copies=copies)
            if doubles is None:
                self._counts["malformed"] += len(hashes)
            else:
                self._counts["doubles"] += doubles

    def _root(self, source: Source, event: Stored) -> bytes | None:
        """The key before the event's first block; None if the source does not hold the parent that it names."""
        if event.parent is None:
            return root_of(event.namespace)
        with self._ledger.writers:
            return self._ledger.key_of(source, hash_of(event.parent))

    def _removed(self, source: Source, event: Removed) -> None:
        count, hashes = len(event.hashes), hashes_of(event.hashes)
        if hashes is None:
            self._miss("malformed", count)
        elif event.namespace_group is not None:  # not the group whose blocks were stored
            self._miss("unknown", count)
        else:
            with self._ledger.writers:
                tiers = ALL_TIERS if event.tier is None else 1 << int(event.tier)
                self._counts["unknown"] += self._ledger.remove(source, hashes, tiers)

    def _miss(self, counter: str, blocks: int) -> None:
        with self._ledger.writers:
            self._counts[counter] += blocks
