"""What engines that share VRAM find through the host's node: blocks in their own VRAM, in a peer's, and in the node's
tiers.
"""

import logging
from abc import abstractmethod
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.copy import Copier, PagedKV, Progress, TokenSlots
from cairn.engine.base import Held
from cairn.engine.hold import Hold, Run
from cairn.engine.node_store import NodeHold, NodeStore
from cairn.engine.vram import Source
from cairn.errors import StorageError
from cairn.index import Noted
from cairn.kv import Keys
from cairn.node import wire
from cairn.node.base import Home, VramHome
from cairn.node.client import Link
from cairn.node.wire import MAX_BLOCKS, raw_of, rows_of
from cairn.observe.log import log_once
from cairn.observe.reasons import Reason

log = logging.getLogger(__name__)


class VramRows(NamedTuple):
    """Blocks first..stop of a chain are these rows of `source`, or, where another process copies them, of `home`.

    noted: how they were found, where they are not pinned.
    """

    first: int
    stop: int
    rows: npt.NDArray[np.int32]
    source: Source | None
    home: VramHome | None = None
    noted: Noted | None = None


class VramHold(NodeHold):
    """Leading blocks in VRAM, and behind them what the node holds elsewhere."""

    def __init__(
        self,
        keys: Keys,
        link: Link,
        numbers: tuple[int, int] | None,
        landed: Callable[[str, int, float], None],
        lead: list[VramRows],
    ) -> None:
        """numbers: of the hold in DRAM, and of that in VRAM; None: nothing is pinned, and all there is is in VRAM."""
        super().__init__(keys, link, numbers[0] if numbers else 0, landed)
        self.lead = lead
        self.ready = lead[-1].stop
        self._settled = self.ready == len(keys)
        self._session = link
        self._held = numbers

    def blocks_by_tier(self, start: int, stop: int) -> dict[str, int]:
        end = self.lead[-1].stop
        found = {"vram": max(0, min(stop, end) - start)}
        return found | super().blocks_by_tier(max(start, end), max(stop, end))

    def run(self, block: int) -> Run:
        part = self._part(block)
        return Run("vram", part.stop) if part else super().run(block)

    def placed(self, blocks: range) -> tuple[Home | VramHome | None, npt.NDArray[np.int32]]:
        part = self._part(blocks.start)
        if part is None:
            return super().placed(blocks)
        return part.home, part.rows[blocks.start - part.first : blocks.stop - part.first]

    def scatter(
        self, copier: Copier, kv: PagedKV, slots: TokenSlots, blocks: range, layers: range | Progress | None = None
    ) -> bool:
        part = self._part(blocks.start)
        if part is None:
            return super().scatter(copier, kv, slots, blocks, layers)
        assert part.source
        assert not isinstance(layers, Progress)
        _, rows = self.placed(blocks)
        try:
            with self._session.passage() as inside, part.source.using(pinned=part.noted is None) as memory:
                if inside is None:
                    self.stop_short(Reason.NODE_AWAY)
                    return False
                if memory is not None:
                    finish = copier.start_scatter(kv, slots, memory, rows, layers)
                    try:
                        self._mention(part)
                    finally:
                        finish()  # whatever happens: until then the slots are written to
                if memory is None or not part.source.sound():
                    self.stop_short(Reason.OWNER_GONE)
                    return False
        except StorageError as error:
            log_once(log, "scatter", f"a copy from VRAM failed: {error}")
            self.stop_short(Reason.IO_ERROR)
            return False
        if part.noted and not part.source.index.unchanged(part.noted):
            self.stop_short(Reason.EVICTED)
            return False
        return True

    def _mention(self, part: VramRows) -> None:
        """Of what is not pinned the node does not know otherwise that it is used, and would sooner evict it."""
        if part.noted and part.source:
            keys = raw_of(self.keys[: part.stop][:MAX_BLOCKS])
            self._session.tell(wire.Used(self._session.welcome.session, part.source.number, keys))

    def _numbers(self) -> tuple[int, ...]:
        return self._held or ()

    def _part(self, block: int) -> VramRows | None:
        return next((part for part in self.lead if block < part.stop), None)


class VramReader(NodeStore):
    """Searches the own segment, then peers' segments, then what the node holds.

    own: the number of the donation that counts as this engine's own; 0: what its own session has donated.
    """

    own = 0

    def match(self, keys: Keys) -> Held:
        return self._match(self._link(), keys, 0)[0]

    def find(self, keys: Keys, *, briefly: bool = False) -> tuple[Held, Hold | None]:  # noqa: ARG002 - the contract
        link, numbers = self._link(), (self._client.number(), self._client.number())
        held, parts = self._match(link, keys, numbers[1])
        lead = self._lead(link, parts) if link else []
        if link and lead and lead[-1].stop == len(keys):
            return held, VramHold(keys, link, numbers, self._landed, lead)
        if link and parts:
            link.end(numbers[1])
        return held, None

    def hold(self, keys: Keys, *, deadline: float) -> NodeHold:
        link = self._link()
        if link is None or not len(keys):
            return super().hold(keys, deadline=deadline)
        found = self.hold_vram(keys, link)
        if found is None:
            return super().hold(keys, deadline=deadline)
        if not found.settled:
            self._take(found, link, keys, deadline)
        return found

    def hold_dram(self, keys: Keys, *, deadline: float) -> NodeHold:
        return super().hold(keys, deadline=deadline)

    def hold_vram(self, keys: Keys, link: Link | None = None) -> VramHold | None:
        """Pins the leading blocks that are in VRAM and can be reached; None if there are none."""
        link = link or self._link()
        if link is None:
            return None
        in_dram, in_vram = self._client.number(), self._client.number()
        session, raw = link.welcome.session, raw_of(keys[:MAX_BLOCKS])
        reply = link.call(wire.TakeVram(in_vram, session, in_vram, raw, self.own))
        lead = self._lead(link, reply.parts) if isinstance(reply, wire.TakenVram) else []
        if lead:
            return VramHold(keys, link, (in_dram, in_vram), self._landed, lead)
        link.end(in_vram)
        return None

    def _match(self, link: Link | None, keys: Keys, number: int) -> tuple[Held, list[wire.VramPart]]:
        """What is held, and, if VRAM has all of it, where that is, pinned under the number, unless it is 0."""
        if link is None or not len(keys):
            return Held(0, own=0), []
        call, session = self._client.number(), link.welcome.session
        reply = link.call(wire.Match(call, session, raw_of(keys[:MAX_BLOCKS]), self.own, number))
        if not isinstance(reply, wire.Matched):
            return Held(0, own=0), []
        return Held(reply.dram, tuple(reply.below), reply.vram, reply.own), reply.parts

    def _lead(self, link: Link, parts: list[wire.VramPart]) -> list[VramRows]:
        """The leading blocks that can be reached, of those that the parts have."""
        lead: list[VramRows] = []
        for part in parts:
            found = self._found(link, part, lead[-1].stop if lead else 0, rows_of(part.rows))
            if found is None:
                break
            lead.append(found)
        return lead

    @abstractmethod
    def _found(self, link: Link, part: wire.VramPart, first: int, rows: npt.NDArray[np.int32]) -> VramRows | None:
        """The blocks from `first` on, which a part has; None if they cannot be reached."""

    def _reserve_vram(self, keys: Keys, link: Link) -> tuple[int, wire.Reserved] | None:
        """Slots of the own segment for what that lacks of the whole chain, and the number they are held by."""
        number = self._client.number()
        raw = raw_of(keys[:MAX_BLOCKS])
        reply = link.call(wire.ReserveVram(number, link.welcome.session, number, raw, self.own))
        if isinstance(reply, wire.Reserved) and reply.first + len(reply.rows) // 4 == len(keys):
            return number, reply
        link.end(number)
        return None

    def _linked(self, link: Link) -> None:
        super()._linked(link)
        self._metrics.watch("vram", partial(self._figures_of, "vram"))
