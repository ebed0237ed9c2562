"""A worker's copies from and to VRAM: begun when the segment is mapped, believed when it was the owner's to the end."""

import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from cairn.config import load_config
from cairn.connect.vllm.vram import VramError, WorkerVram, _VramCopy, refuse_vram
from cairn.engine.vram import Source
from cairn.errors import ConfigError
from cairn.kv import CANONICAL
from cairn.node import wire
from cairn.node.base import VramHome
from cairn.node.gate import Entrance, Gate
from cairn.node.life import Life, process_token
from cairn.observe.reasons import Reason
from cairn.tier.vram import open_device
from tests.engine.pages import GEOMETRY, SLOT, prompt, stored
from tests.node.rig import ThreadNode, address_in
from tests.node.vram_owner import vram_engine


class Rig:
    """A source, the gate of a session that holds rows of it, and copies that end when they are told to."""

    def __init__(self, home: Path) -> None:
        self.gate = Gate(home / "gate")
        self.entrance = Entrance(home / "gate")
        self.life = Life(home / "life", 7, process_token(), 2, make=True)
        self.source = Source(7, open_device("stand-in").take(2, SLOT), self.life, own=False)
        self.mapped: Future[Source] = Future()
        self.copies: list[Future[float]] = []

    def begin(self, memory: Any) -> "Future[float]":
        assert memory.shape == (2, SLOT)
        self.copies.append(Future())
        return self.copies[-1]

    def copy(self) -> _VramCopy:
        return _VramCopy(self.mapped, self.begin, self.entrance)


def reason(copy: Any) -> str:
    error = copy.exception()
    assert isinstance(error, VramError)
    return str(error.reason)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    return Rig(tmp_path)


def test_a_copy_begins_when_its_segment_is_mapped(rig: Rig) -> None:
    copy = rig.copy()
    assert not copy.done()
    assert rig.copies == []
    rig.mapped.set_result(rig.source)
    assert not copy.done()
    assert not rig.gate.close(), "it is inside"
    rig.source.retire()
    assert not rig.source.settled(0), "and uses the memory"
    rig.copies[0].set_result(0.5)
    assert copy.done()
    assert reason(copy) == "owner_gone", "it was taken back meanwhile"
    assert rig.source.settled(0)
    assert rig.gate.close()


def test_a_copy_of_a_sound_segment_is_right(rig: Rig) -> None:
    rig.mapped.set_result(rig.source)
    copy = rig.copy()
    rig.copies[0].set_result(0.5)
    assert copy.done()
    assert copy.exception() is None
    assert copy.result() == 0.5


def test_what_was_right_at_a_copys_end_stays_right(rig: Rig) -> None:
    """Whatever becomes of the segment between two questions of the model's thread."""
    rig.mapped.set_result(rig.source)
    copy = rig.copy()
    rig.copies[0].set_result(0.5)
    assert copy.exception() is None
    rig.source.retire()
    assert copy.result() == 0.5


@pytest.mark.parametrize("why", ["io_error", "node_away", "owner_gone"])
def test_a_copy_that_may_not_begin_has_failed(rig: Rig, why: str) -> None:
    if why == "node_away":
        assert rig.gate.close()
    if why == "owner_gone":
        rig.source.retire()
    if why == "io_error":
        rig.mapped.set_exception(VramError(Reason.IO_ERROR, "injected"))
    else:
        rig.mapped.set_result(rig.source)
    copy = rig.copy()
    assert copy.done()
    assert reason(copy) == why
    assert rig.copies == []
    assert rig.gate.close()


def donated(worker: WorkerVram) -> int:
    deadline = time.monotonic() + 60
    while not (number := worker.donation()):
        assert time.monotonic() < deadline
        time.sleep(0.01)  # as a worker between steps
    return number


def test_a_worker_donates_and_reaches_its_peers(tmp_path: Path) -> None:
    address = address_in(tmp_path)
    node = ThreadNode(address, **{"storage.cpu.size": 80 * SLOT, "node.lease_s": 30})
    settings = {"storage.vram.size": 8 * SLOT, "storage.vram.device": "stand-in", "node.address": address}
    settings["node.timeout_s"] = 2
    config = load_config(environ={}, overrides=settings)
    served: Any = SimpleNamespace(row_geometry=GEOMETRY, row_layout=CANONICAL, ranks=1)
    try:
        worker = WorkerVram(config, served)
        first = donated(worker)
        with vram_engine(address, 10) as peer:
            assert stored(peer, prompt(1, 40)) == 40
            link = peer._store._link()  # type: ignore[attr-defined]
            found = link.call(
                wire.Match(1 << 40, link.welcome.session, wire.raw_of(peer.chain(prompt(1, 40)).keys), 0, 1)
            )
            [part] = found.parts
            entrance = Entrance(Path("/dev/shm") / link.welcome.gate)
            seen: list[Any] = []

            def begin(memory: Any) -> "Future[float]":
                seen.append(memory.copy())
                over: Future[float] = Future()
                over.set_result(0.0)
                return over

            copy = worker.copy(VramHome(part.donation, "", part), begin, entrance)
            assert copy.exception() is None
            assert np.count_nonzero(seen[0][wire.rows_of(part.rows)])
            # Its own, by number alone; under a number of before it is nobody's.
            assert worker.copy(VramHome(first, "", None), begin, entrance).exception() is None
            assert worker.copy(VramHome(first - 1, "", None), begin, entrance).exception()
            link.end(1)
        client = worker._client
        assert client.link
        client.link._lost("the test says so")
        while donated(worker) == first:
            time.sleep(0.01)
        assert worker.copy(VramHome(first, "", None), begin, entrance).exception(), "what was donated before"
        worker.close()
    finally:
        node.close()


def test_who_cannot_share_is_told_why() -> None:
    base = {"storage.vram.size": 1024, "node.address": "ipc:///run/node.sock"}
    one, two = (SimpleNamespace(ranks=ranks) for ranks in (1, 2))
    for ranks, settings, why in (
        (one, {"storage.vram.size": 1024}, r"set node\.address"),
        (two, base, "2 ranks"),
    ):
        config = load_config(environ={}, overrides=settings)
        with pytest.raises(ConfigError, match=rf"^storage\.vram\.size=1024: .*{why}.*, or set the size to 0$"):
            refuse_vram(ranks, config)  # type: ignore[arg-type]
    base["blending.enabled"] = True
    refuse_vram(one, load_config(environ={}, overrides=base))  # type: ignore[arg-type]
