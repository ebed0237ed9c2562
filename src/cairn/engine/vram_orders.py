"""The store of an engine whose worker shares VRAM and copies there: it knows what is where, and maps nothing."""

import numpy as np
import numpy.typing as npt

from cairn.engine.base import Held
from cairn.engine.node_store import NodeWriting
from cairn.engine.vram_pool import VramReader, VramRows
from cairn.kv import Keys
from cairn.node import wire
from cairn.node.base import VramHome
from cairn.node.client import Link

#: Donations that could not be read are remembered, so that no request tries again; up to so many.
_AVOIDED = 1024


class OrderedWriting(NodeWriting):
    """Rows of the worker's segment."""

    tier = "vram"

    def __init__(self, store: "OrderedVramStore", link: Link, number: int, reply: wire.Reserved) -> None:
        super().__init__(link, number, reply, store.committed)
        self.home = VramHome(store.own, link.welcome.gate, None)


class OrderedVramStore(VramReader):
    """Names rows in VRAM for a worker to copy, to whom `Hold.placed` and `Writing.home` go. own: the donation that the
    worker has told of; 0: there is none now, and nothing is written to VRAM.

    `write` is DRAM's: what is written goes to VRAM (`write_vram`) and to DRAM, both from the pages that it is in.
    """

    _avoided: frozenset[int] = frozenset()

    def write_vram(self, keys: Keys) -> NodeWriting | None:
        """Rows for the blocks that the worker's segment lacks; None if it lacks none, or has no room for all."""
        link = self._link()
        reserved = self._reserve_vram(keys, link) if link and self.own else None
        if link is None or reserved is None:
            return None
        writing = OrderedWriting(self, link, *reserved)
        if len(writing.rows):
            return writing
        writing.end()
        return None

    def avoid(self, donation: int) -> None:
        """The worker could not read there: nobody is sent there again."""
        self._avoided = (self._avoided if len(self._avoided) < _AVOIDED else frozenset()) | {donation}

    def committed(self, new: int) -> None:
        """Told of blocks that have become findable in VRAM."""
        self._metrics.stored_tokens.add(new * self._geometry.block_tokens, tier="vram")

    def _match(self, link: Link | None, keys: Keys, number: int) -> tuple[Held, list[wire.VramPart]]:
        held, parts = super()._match(link, keys, number)
        return held._replace(own=None), parts

    def _found(self, link: Link, part: wire.VramPart, first: int, rows: npt.NDArray[np.int32]) -> VramRows | None:
        if part.donation in self._avoided:
            return None
        part.rows = bytearray()
        home = VramHome(part.donation, link.welcome.gate, part)
        return VramRows(first, first + len(rows), rows, None, home)
