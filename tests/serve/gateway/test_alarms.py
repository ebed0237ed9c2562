"""Alarms of one length: each rings in its turn, unless it is cancelled."""

import asyncio

import pytest

from cairn.serve.gateway.alarms import Alarms


def test_they_ring_in_turn_and_those_that_are_cancelled_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        loop, now, rung = asyncio.get_running_loop(), 100.0, list[tuple[str, float]]()
        monkeypatch.setattr(loop, "time", lambda: now)
        alarms = Alarms[str](10.0, lambda who: rung.append((who, now)))
        for who, at in (("a", 100.0), ("b", 101.0), ("c", 104.0), ("d", 104.0)):
            now = at
            alarms.set(who)
        alarms.cancel("b")
        alarms.cancel("nobody")
        for at in (109.0, 110.5, 111.5, 114.5, 130.0):
            now = at
            for _ in range(3):
                await asyncio.sleep(0)
        assert rung == [("a", 110.5), ("c", 114.5), ("d", 114.5)]
        alarms.set("b")  # after a while without any
        now = 141.0
        for _ in range(3):
            await asyncio.sleep(0)
        assert rung[3:] == [("b", 141.0)]

    asyncio.run(run())


def test_whoever_rings_may_set_it_again() -> None:
    async def run() -> None:
        rung, over = list[str](), asyncio.Event()

        def ring(who: str) -> None:
            rung.append(who)
            if len(rung) < 3:
                alarms.set(who)
            else:
                over.set()

        alarms = Alarms[str](0.001, ring)
        alarms.set("a")
        await asyncio.wait_for(over.wait(), 30)
        assert rung == ["a"] * 3

    asyncio.run(run())
