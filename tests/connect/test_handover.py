"""What prefill and decode instances tell each other, over a real remote store; with vLLM: tests/vllm."""

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cairn.connect.vllm import handover
from cairn.engine import CacheEngine
from tests.engine.pages import BLOCK, make_engine, prompt, retrieved, stored

TOKENS = prompt(1, 10 * BLOCK + 3)


def engine(home: Path, **settings: Any) -> CacheEngine:
    remote = {"storage.remote.url": f"file://{home}/shared", "storage.remote.object_size": 1024}
    remote |= {"engine.enable_disagg_pd": True, "engine.timeout_s": 30, "storage.remote.lookup_timeout_s": 10}
    return make_engine(64, **{**remote, **settings})


def promised(told: Any, there: CacheEngine, tokens: Any = TOKENS) -> handover.Promise | None:
    return handover.promise(SimpleNamespace(kv_transfer_params=told), there.chain(tokens), there)


def ends(promise: handover.Promise, within_s: float) -> float:
    """After how long it is not waited for any more."""
    begun = time.monotonic()
    while promise.pending():
        assert time.monotonic() - begun < within_s
        time.sleep(0.001)  # as vLLM's scheduler does
    return time.monotonic() - begun


def test_what_is_stored_is_awaited_and_found(tmp_path: Path) -> None:
    with engine(tmp_path) as here, engine(tmp_path, **{"engine.planner": False}) as there:
        promise = promised(handover.told(here.chain(TOKENS), 10), there)
        assert promise
        assert promise.blocks == 10
        for _ in range(20):  # while it is known that it is not there
            assert promise.pending()
            time.sleep(0.002)
        assert stored(here, TOKENS) == 10 * BLOCK
        assert ends(promise, 25) < 25
        assert there.held(there.chain(TOKENS)) == 10
        assert retrieved(there, TOKENS) == 10 * BLOCK


def never(engine: CacheEngine) -> None:
    """Nothing is known of its speed."""


def fast(engine: CacheEngine) -> None:
    for tokens in (40, 80, 160, 320) * 4:
        engine.observe_prefill(tokens, 0, tokens * 1e-3)


@pytest.mark.parametrize(("speed", "timeout_s"), [(never, 0.2), (fast, 30.0)])
def test_what_does_not_come_is_awaited_no_longer_than_computing_it_takes(
    tmp_path: Path, speed: Callable[[CacheEngine], None], timeout_s: float
) -> None:
    with engine(tmp_path, **{"engine.timeout_s": timeout_s}) as there:
        speed(there)
        promise = promised(handover.told(there.chain(TOKENS), 10), there)
        assert promise
        assert ends(promise, 20) >= 0.03


def test_what_is_about_other_blocks_is_not_awaited(tmp_path: Path) -> None:
    with engine(tmp_path) as there:
        chain = there.chain(TOKENS)
        told = handover.told(chain, 10)
        assert told
        assert handover.told(chain, 0) is None
        assert promised(told, there)
        assert promised(told, there, TOKENS[: 9 * BLOCK]) is None
        assert promised(told, there, TOKENS[::-1]) is None
        key = told["cairn"]
        others: list[Any] = [key | {"blocks": blocks} for blocks in (-1, 0, 9, 11)]
        for other in [*others, key | {"last": 5}, {}, None, "x", [1]]:
            assert promised(told | {"cairn": other}, there) is None
        for params in (None, {}, [], told | {"do_remote_prefill": False}, {"do_remote_prefill": True}):
            assert promised(params, there) is None
