"""A hold by itself: what it tells of the tiers that its blocks came from."""

from concurrent.futures import Future

import numpy as np

from cairn.engine.hold import LocalHold
from cairn.index import LRU, PrefixIndex
from cairn.kv import KeyChain
from cairn.tier.base import Outcomes


def test_reads_that_are_over_at_once_took_no_less_than_no_time() -> None:
    """The first batch lands those behind it, too, before it was noted when these were finished."""
    keys = KeyChain(bytes(16), 4, np.arange(16)).keys
    index, landed = PrefixIndex(8, LRU), list[tuple[str, int, float]]()
    hold = LocalHold(index, keys, index.pin(keys), lambda *one: landed.append(one), np.zeros((8, 64), np.uint8))
    hold.prepare()
    for tier, first in (("disk", 0), ("remote", 2)):
        future: Future[Outcomes] = Future()
        future.set_result([None, None])
        hold.expect(tier, first, index.reserve(2), future)
    hold.start()
    assert hold.settled
    assert hold.ready == 4
    assert [one[:2] for one in landed] == [("disk", 2), ("remote", 2)]
    assert all(0 <= seconds < 60 for _, _, seconds in landed)
    hold.release()
    assert index.pinned == 0
