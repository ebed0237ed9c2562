"""A node that is stopped, and not dead: it is waited for once, and found again when it goes on."""

import signal
import threading
import time
from pathlib import Path
from typing import Final

import pytest

from cairn.config import load_config
from cairn.engine import CacheEngine, TaskStatus
from cairn.node import wire
from cairn.node.client import Link
from cairn.observe.reasons import Reason
from tests.engine.pages import SLOT, Pages, namespace, prompt, retrieved, stored

from .peer import Peer, within
from .rig import ProcessNode, address_in, thread_node

TIMEOUT_S: Final = 1.0
CALLS: Final = 12


def test_what_could_not_be_given_back_in_time_goes_with_the_session(tmp_path: Path) -> None:
    """Calls before it take longer together than one may, and each is answered: the node must not keep the rows."""
    overrides = {"engine.planner": False, "node.timeout_s": TIMEOUT_S}
    with (
        thread_node(address_in(tmp_path), **{"storage.cpu.size": 64 * SLOT}),
        CacheEngine(namespace(), load_config(environ={}, overrides=overrides), node=address_in(tmp_path)) as engine,
    ):
        tokens, peer = prompt(1, 40), Peer(address_in(tmp_path)).hello()
        assert stored(engine, tokens) == 40
        stage = engine.stage(engine.chain(tokens))
        assert peer.busy() == (10, 0)
        with engine._store._client.link._lock:  # type: ignore[attr-defined]
            stage.release()
        assert within(10, peer, lambda: peer.busy() == (0, 0))
        peer.close()


def test_what_was_not_committed_was_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The session is lost between the copy and its commit."""
    call = Link.call

    def loses(link: Link, request: wire.Request) -> wire.Reply | None:
        if isinstance(request, wire.Commit):
            link._lost("the test says so")
        return call(link, request)

    overrides = {"engine.planner": False, "node.timeout_s": TIMEOUT_S}
    with (
        thread_node(address_in(tmp_path), **{"storage.cpu.size": 64 * SLOT}),
        CacheEngine(namespace(), load_config(environ={}, overrides=overrides), node=address_in(tmp_path)) as engine,
    ):
        pages, tokens = Pages(), prompt(1, 40)
        engine.register_kv_caches(pages.tensors)
        monkeypatch.setattr(Link, "call", loses)
        put = engine.put_async(tokens, pages.slots(40))
        result = engine.wait([put])[put]
        assert result.status is TaskStatus.FAILED
        assert not result.mask.any()
        assert engine.metrics.skipped_tokens.value(reason=Reason.NODE_AWAY) == 40


def test_a_frozen_node_is_waited_for_once(tmp_path: Path) -> None:
    """By all threads together, in whatever they do: else these calls would take a minute."""
    node = ProcessNode(address_in(tmp_path), **{"storage.cpu.size": 64 * SLOT})
    overrides = {"engine.planner": False, "node.timeout_s": TIMEOUT_S}
    tokens = prompt(1, 40)
    with CacheEngine(namespace(), load_config(environ={}, overrides=overrides), node=address_in(tmp_path)) as engine:
        assert stored(engine, tokens) == 40
        client = engine._store._client  # type: ignore[attr-defined]
        assert client.losses == 0
        client._found.clear()
        node.process.send_signal(signal.SIGSTOP)
        found: list[int] = []

        def use(seed: int) -> None:
            for i in range(CALLS):
                found.append(retrieved(engine, tokens))
                found.append(stored(engine, prompt(100 * seed + i, 8)))

        threads = [threading.Thread(target=use, args=(seed,)) for seed in range(3)]
        started = time.monotonic()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert time.monotonic() - started < 20 * TIMEOUT_S
        assert found == [0] * (2 * 3 * CALLS)
        assert client.losses == 1
        assert engine.metrics.miss_tokens.value(reason=Reason.NODE_AWAY) > 0
        node.process.send_signal(signal.SIGCONT)
        assert client.wait(60)
        assert retrieved(engine, tokens) == 40
