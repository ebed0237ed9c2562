"""A client's session: what it holds, under one lease, behind one gate."""

import time
from typing import Final

from cairn.kv import Keys
from cairn.node.base import PoolHold, PoolWriting
from cairn.node.following import Following
from cairn.node.gate import Gate
from cairn.node.pools import Pool
from cairn.node.vram import Donation, VramHold
from cairn.node.wire import Progress, WireError, raw_of
from cairn.node.zmtp import Caller

#: Holds, reservations and questions that a session may have at a time.
MAX_NUMBERS: Final = 4096


class Held:
    """A hold, and how much of it the client knows."""

    __slots__ = ("hold", "number", "over", "told")

    def __init__(self, number: int, hold: PoolHold) -> None:
        self.number = number
        self.hold = hold
        self.told = 0
        self.over = False

    def news(self, call: int) -> Progress:
        """What the client does not know yet."""
        hold = self.hold
        # In this order: `ready` is final once it has settled.
        self.over = hold.settled
        first, ready = self.told, hold.ready
        self.told = ready
        return Progress(
            call,
            self.number,
            first,
            raw_of(hold.ids[first:ready]),
            list(hold.blocks_by_tier(first, ready).items()) if ready > first else [],
            self.over,
            str(hold.reason or ""),
        )


class Written:
    """A reservation, and how many of its rows are committed."""

    __slots__ = ("done", "writing")

    def __init__(self, writing: PoolWriting) -> None:
        self.writing = writing
        self.done = 0

    def commit(self, count: int) -> int:
        """Raises WireError for more rows than there are."""
        if self.done + count > len(self.writing.rows):
            raise WireError(f"commit of {count} rows, {len(self.writing.rows) - self.done} are reserved")
        self.done += count
        return self.writing.commit(count)


class Session:
    """For the node's loop alone. seen: when it last said something, monotonic. hears: by which connection."""

    def __init__(self, number: int, pool: Pool, gate: Gate) -> None:
        self.number = number
        self.pool = pool
        self.gate = gate
        self.seen = time.monotonic()
        self.hears: Caller | None = None
        self.holds: dict[int, Held] = {}
        self.vram_holds: dict[int, VramHold] = {}
        self.withdrawn: Donation | None = None
        self.writings: dict[int, Written] = {}
        self.asked: set[int] = set()
        self.flushing: set[int] = set()
        self.following: dict[str, Following] = {}
        pool.sessions += 1

    def check_new(self, number: int) -> None:
        """Raises WireError for a number that cannot be given to something new."""
        if (
            number in self.holds
            or number in self.vram_holds
            or number in self.writings
            or number in self.asked
            or number in self.flushing
        ):
            raise WireError(f"number {number} is in use")

    @property
    def full(self) -> bool:
        """Whether it has as many as it may: more are not given, and what it has stays."""
        used = len(self.holds) + len(self.vram_holds) + len(self.writings) + len(self.asked) + len(self.flushing)
        return used >= MAX_NUMBERS

    def follow(self, number: int, tier: str) -> None:
        """Its next changes are asked for, or its first."""
        following = self.following.get(tier)
        if following is None or following.number != number:
            if following:
                following.end()
                del self.following[tier]
            journal = self.pool.store.journal(tier)
            if journal is None:
                return  # nothing will ever come
            following = self.following[tier] = Following(number, journal)
        following.asked = True

    def mention(self, keys: Keys) -> None:
        """What the session asks for is told to it, however long it has been there."""
        for following in self.following.values():
            following.journal.mention(keys)

    def end(self, number: int) -> None:
        """Gives back what has this number, if anything has."""
        held = self.holds.pop(number, None)
        if held:
            held.hold.release()
        in_vram = self.vram_holds.pop(number, None)
        if in_vram:
            in_vram.release()
        written = self.writings.pop(number, None)
        if written:
            written.writing.end()
        self.asked.discard(number)

    def give_back(self) -> None:
        """Everything. Only behind a gate that is closed, with nobody inside."""
        for number in [*self.holds, *self.vram_holds, *self.writings]:
            self.end(number)
        for following in self.following.values():
            following.end()
        self.gate.remove()
        self.pool.sessions -= 1
        self.pool.idle_since = time.monotonic()
