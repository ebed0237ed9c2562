"""The node's way to a remote store: what several engines of a host ask for at a time is fetched once."""

import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.observe.reasons import Reason
from cairn.tier.remote.base import Get
from cairn.tier.remote.files import FileStore
from cairn.tier.remote.reads import Fetches
from tests.engine.pages import BLOCK, SLOT, namespace, prompt, retrieved, stored

from .rig import TIMEOUT_S, address_in, thread_node

TOKENS = 10 * BLOCK


def settings(home: Path, dram_blocks: int = 40) -> dict[str, Any]:
    return {
        "storage.cpu.size": dram_blocks * SLOT,
        "storage.remote.url": f"file://{home}/shared",
        "storage.remote.timeout_s": TIMEOUT_S,
        "storage.remote.lookup_timeout_s": 10,
        "engine.planner": False,
        "engine.timeout_s": TIMEOUT_S,
        "engine.lease_s": TIMEOUT_S,
        "node.timeout_s": 2,
    }


def client(home: Path, address: str) -> CacheEngine:
    return CacheEngine(namespace(), load_config(environ={}, overrides=settings(home)), node=address)


def test_two_engines_that_ask_at_the_same_time_fetch_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store answers only once the node has the second engine's request for the same object."""
    tokens, address = prompt(1, TOKENS), address_in(tmp_path)
    with CacheEngine(namespace(), load_config(environ={}, overrides=settings(tmp_path))) as engine:
        assert stored(engine, tokens) == TOKENS
        assert engine.flush(TIMEOUT_S)

    both, asked, fetched = threading.Event(), [], []
    add, get_into = Fetches.add, FileStore.get_into

    def counted_add(self: Fetches, pieces: list[Any]) -> None:
        add(self, pieces)
        asked.extend(pieces)
        if len(asked) == 2:
            both.set()

    def gated_get(self: FileStore, gets: Sequence[Get], *, deadline: float) -> list[int | Reason]:
        assert both.wait(TIMEOUT_S)
        fetched.extend(gets)
        return get_into(self, gets, deadline=deadline)

    monkeypatch.setattr(Fetches, "add", counted_add)
    monkeypatch.setattr(FileStore, "get_into", gated_get)
    with (
        thread_node(address, **settings(tmp_path)),
        client(tmp_path, address) as one,
        client(tmp_path, address) as other,
        ThreadPoolExecutor(2) as threads,
    ):
        assert list(threads.map(lambda engine: retrieved(engine, tokens), (one, other))) == [TOKENS, TOKENS]
        assert (len(asked), len(fetched)) == (2, 1)
        # And who comes later finds it in the host's DRAM.
        with client(tmp_path, address) as late:
            assert retrieved(late, tokens) == TOKENS
        assert (len(asked), len(fetched)) == (2, 1)
