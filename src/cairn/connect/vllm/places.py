"""Where a worker's copies begin and end: the arena of its own engine, or those of the host's node, as they come.

A node that was started anew has another arena. It is mapped, and pinned for the GPU, in the background; copies that
name it before that are refused, which is a miss.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from cairn.connect.vllm.movers import Copying, Layers, Mover, Rows, failed
from cairn.copy import TokenSlots
from cairn.errors import StorageError
from cairn.kv import KVGeometry, Layout
from cairn.node.base import Home, VramHome
from cairn.node.gate import Entrance
from cairn.node.segments import path_of
from cairn.observe.log import log_once
from cairn.tier.arena import Arena

logger = logging.getLogger(__name__)

#: Makes a mover between this worker's paged cache and an arena.
MakeMover = Callable[[Arena], Mover]
Begin = Callable[[TokenSlots, Rows], Copying]
#: How long a worker that starts waits for the node to have its pool, seconds.
START_S = 60.0
_KEPT_ENTRANCES = 4


class Place:
    """One arena and its mover. entrance: of the gate that guards the rows at hand; None: nobody else can take them."""

    def __init__(self, mover: Mover, entrance: Entrance | None) -> None:
        self.mover = mover
        self._entrance = entrance

    def copy(self, begin: Begin, slots: TokenSlots, rows: Rows) -> Copying:
        """Begins a copy (`mover.load` or `mover.store`), and is inside of the gate until it is over."""
        entrance = self._entrance
        if entrance is None:
            return begin(slots, rows)
        if not entrance.enter():
            return refused()
        try:
            copying = begin(slots, rows)
        except BaseException:
            entrance.leave()
            raise
        copying.add_done_callback(lambda _: entrance.leave())
        return copying

    def by_token(self) -> "Place":
        """The same place, by its mover of single tokens, which it must have."""
        assert self.mover.by_token
        return Place(self.mover.by_token, self._entrance)

    def load_layers(self, slots: TokenSlots, rows: Rows) -> Layers:
        """As the mover's, inside of the gate."""
        if self._entrance is None:
            return self.mover.load_layers(slots, rows)
        if not self._entrance.enter():
            return Refused()
        try:
            return _Guarded(self.mover.load_layers(slots, rows), self._entrance)
        except BaseException:
            self._entrance.leave()
            raise


def refused() -> Copying:
    """A copy that is not made, because its rows are not this engine's any more, or not mapped yet."""
    return failed(StorageError("the node has taken the rows back, or its arena is not mapped yet"))


class Refused(Layers):
    """A layered load that is not made."""

    def wait(self, layer: int, timeout: float) -> None:
        """Nothing will come."""

    def end(self) -> Copying:
        return refused()


class _Guarded(Layers):
    def __init__(self, layers: Layers, entrance: Entrance) -> None:
        self._layers = layers
        self._entrance = entrance

    def wait(self, layer: int, timeout: float) -> None:
        self._layers.wait(layer, timeout)

    def end(self) -> Copying:
        over = self._layers.end()
        over.add_done_callback(lambda _: self._entrance.leave())
        return over


class Places:
    """For the model runner's thread alone.

    own: the engine's arena, or None where a node keeps the blocks; then `find` asks the node at `address`.
    """

    def __init__(self, make: MakeMover, own: Arena | None) -> None:
        self._make = make
        self._arena = ""
        self._mover: Mover | None = None
        self._entrances: dict[str, Entrance] = {}
        self._leaving: list[Mover] = []
        self._attaching: tuple[str, Future[Mover]] | None = None
        self._attacher: ThreadPoolExecutor | None = None
        if own is not None:
            self._mover = make(own)

    def find(self, address: str, geometry: KVGeometry, layout: Layout, timeout_s: float) -> None:
        """Maps the arena of the node that is there now, if one is. geometry: of all ranks together. layout: of
        their rows."""
        from cairn.node.client import NodeClient

        client = NodeClient(address, geometry, layout, timeout_s=timeout_s)
        try:
            link = client.wait(START_S if client.path.exists() else 0.0)
            if link:
                self._arena, self._mover = link.home.arena, self._make(link.arena)
        finally:
            client.close()

    @property
    def mover(self) -> Mover | None:
        """The latest arena's."""
        return self._mover

    def settle_stores(self) -> None:
        """As the mover's. An arena that has been left behind takes no stores any more, and those under way have been
        waited for when its mover was closed, or are waited for now."""
        for mover in (self._mover, *self._leaving):
            if mover:
                mover.settle_stores()

    def at(self, home: Home | VramHome | None) -> Place | None:
        """Where rows of `home` are; None if they cannot be reached, or not yet. (VRAM is `WorkerVram`'s.)"""
        if home is None:
            return Place(self._mover, None) if self._mover else None
        if isinstance(home, VramHome):
            return None
        if home.arena != self._arena and not self._attached(home):
            return None
        assert self._mover
        entrance = self.entrance(home.gate)
        return Place(self._mover, entrance) if entrance else None

    def close(self) -> None:
        if self._attacher:
            self._attacher.shutdown(wait=True)
        if self._mover:
            self._mover.close()

    def _attached(self, home: Home) -> bool:
        if self._attaching is None or self._attaching[0] != home.arena:
            self._attacher = self._attacher or ThreadPoolExecutor(1, "cairn-attach")
            self._attaching = home.arena, self._attacher.submit(self._attach, home)
        future = self._attaching[1]
        if not future.done():
            return False
        if error := future.exception():
            log_once(logger, f"attach {type(error).__name__}", f"the node's arena cannot be mapped: {error}")
            return False
        if self._mover and self._attacher:
            self._leaving = [self._mover]
            self._attacher.submit(self._mover.close)
        self._arena, self._mover, self._attaching = home.arena, future.result(), None
        self._entrances.clear()
        return True

    def _attach(self, home: Home) -> Mover:
        return self._make(Arena.attach(home.arena, home.slots, home.stride))

    def entrance(self, gate: str) -> Entrance | None:
        """Of a session's gate; None where there is no such gate any more."""
        if gate not in self._entrances:
            try:
                entrance = Entrance(path_of(gate))
            except OSError as error:
                log_once(logger, "gate", f"the node's gate cannot be opened: {error}")
                return None
            if len(self._entrances) >= _KEPT_ENTRANCES:
                self._entrances.pop(next(iter(self._entrances)))
            self._entrances[gate] = entrance
        return self._entrances[gate]
