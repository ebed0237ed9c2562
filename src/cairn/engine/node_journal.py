"""The journal of one of the node's tiers, read from afar."""

import threading
from collections.abc import Callable, Mapping
from functools import partial

import numpy as np

from cairn.index.journal import NOTHING, Changes
from cairn.index.slots import SlotIds
from cairn.kv import Keys
from cairn.kv.keys import KEY_BYTES
from cairn.node import wire
from cairn.node.client import Link, NodeClient
from cairn.node.wire import keys_of, raw_of, rows_of


class NodeJournal:
    """Read as `cairn.index.journal.Journal` is, though the index is the node's: every engine has its own journal there.

    Changes come by themselves, one batch at a time, and the next is asked for when the reader comes again; reading
    waits for nothing. When the session is over, all that was told counts as removed, since nobody says any more when it
    goes; a new session begins with everything silent. `begin` comes from the client's thread, the rest from one reader.
    """

    def __init__(self, tier: str, client: NodeClient, figures: Callable[[str], Mapping[str, float]]) -> None:
        self._tier = tier
        self._client = client
        self._figures = figures
        self._lock = threading.Lock()
        self._link: Link | None = None
        self._number = 0
        self._arrived: wire.Changed | None = None
        self._lost = False
        self._behind = False
        self._told: set[bytes] = set()
        self._latest = NOTHING
        self._latest_number = 0

    @property
    def capacity(self) -> int:
        """Slots of the tier, as far as it is known."""
        return int(self._figures(self._tier).get("capacity_blocks", 0))

    def begin(self, link: Link) -> None:
        """Has the node tell what comes from now on; what it holds already is silent."""
        number = self._client.number()
        with self._lock:
            if not link.alive:
                return  # another may have begun meanwhile
            before, old = self._link, self._number
            self._link, self._number, self._arrived, self._behind = link, number, None, False
        if before:
            before.forget(old)
        link.expect(number, partial(self._hear, number))
        link.tell(wire.Follow(link.welcome.session, number, self._tier))

    def changes(self) -> Changes:
        """The difference since the last call, as far as it has come; from now on it counts as told."""
        with self._lock:
            if self._lost:
                self._lost = False
                gone, self._told = self._told, set()
                return Changes(NOTHING.stored, NOTHING.slots, keys_of(bytearray().join(gone)))
            arrived, self._arrived = self._arrived, None
            behind, self._behind = self._behind, arrived is not None
            link, number = self._link, self._number
            self._latest_number = number
        if arrived is None:
            if behind and link:
                link.tell(wire.Follow(link.welcome.session, number, self._tier))
            return NOTHING
        changes = Changes(keys_of(arrived.stored), rows_of(arrived.rows), keys_of(arrived.removed))
        self._told.difference_update(_split(changes.removed))
        self._told.update(_split(changes.stored))
        self._latest = changes
        return changes

    def silence(self, slots: SlotIds) -> None:
        """Takes back that these slots, of the latest changes, were told: they are silent, and so will be their end."""
        if not len(slots):
            return
        self._told.difference_update(_split(self._latest.stored[np.isin(self._latest.slots, slots)]))
        with self._lock:
            link, number = self._link, self._number
        if link and number == self._latest_number:
            link.tell(wire.Silence(link.welcome.session, number, raw_of(slots)))

    def mention(self, keys: Keys) -> None:
        """Nothing to do: the node does it with every match and every write of this engine."""

    def clear(self) -> None:
        """Nothing counts as told any more, and whatever is there is silent."""
        self._told.clear()
        with self._lock:
            self._lost = False
            link = self._link
        if link:
            self.begin(link)

    def _hear(self, number: int, reply: wire.Reply | None) -> None:
        with self._lock:
            if number != self._number:
                return
            if isinstance(reply, wire.Changed):
                self._arrived = reply
            else:
                self._link, self._arrived, self._lost = None, None, True


def _split(keys: Keys) -> list[bytes]:
    whole = keys.tobytes()
    return [whole[at : at + KEY_BYTES] for at in range(0, len(whole), KEY_BYTES)]
