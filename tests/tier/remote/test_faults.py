"""Stores that die, freeze, forget, crawl and fill up: no wrong bytes, no call past its deadline, and a way back."""

import contextlib
import os
import resource
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from cairn.observe.reasons import Reason
from cairn.tier import pace
from cairn.tier.breaker import Breaker
from cairn.tier.remote import RemoteTier
from cairn.tier.remote.files import FileStore
from cairn.tier.remote.tier import Limits
from tests.tier.remote import servers
from tests.tier.remote.proxy import Proxy
from tests.tier.remote.rig import PACK, Place, ask, loaded, opened, read, write
from tests.tier.remote.test_conformance import fresh
from tests.tier.rig import soon

#: What an operation may take here, and how much longer a call may take to say so on a busy machine.
LIMITS = Limits(timeout_s=0.4, lookup_timeout_s=0.4, threads=2)
GRACE_S = 2.0
REST_S = 0.3


class Victim(NamedTuple):
    """Servers, and the store on them. through: the same store by another port, of a proxy."""

    server: servers.Group
    place: Place
    through: Callable[[int], Place] | None = None

    def opened(self, limits: Limits = LIMITS) -> "contextlib.AbstractContextManager[RemoteTier]":
        breaker = Breaker(cooldown_seconds=REST_S, longest_seconds=2 * REST_S)
        return opened(self.place, limits, breaker=breaker)


def victim_of(kind: str, request: pytest.FixtureRequest) -> Victim:
    if kind == "mooncake":
        cluster: servers.Mooncake = request.getfixturevalue("mooncake_cluster")
        return Victim(cluster.group, Place(cluster.url, "mooncake", has_ttl=False))
    server: servers.Group = request.getfixturevalue(f"{kind}_server")

    def place(port: int) -> Place:
        return Place(f"valkey://127.0.0.1:{port}" if kind == "valkey" else servers.s3_url(port), kind)

    return Victim(server, place(server.ports[0]), place)


@pytest.fixture(params=["valkey", "s3", "mooncake"])
def victim(request: pytest.FixtureRequest) -> Iterator[Victim]:
    """As the last test should have left it: running, and neither frozen nor slow."""
    victim = victim_of(request.param, request)
    yield victim
    victim.server.thaw()


def in_time(tier: RemoteTier, keys: np.ndarray, timeout: float = 0.5) -> list[Reason | None]:
    """One load; it ends by its deadline, whatever the store does."""
    begun = time.monotonic()
    outcomes = read(tier, keys, timeout=timeout)
    assert time.monotonic() - begun < timeout + GRACE_S
    return outcomes


def opens_within_three(tier: RemoteTier, keys: np.ndarray) -> None:
    """Single loads fail until the breaker opens, which takes three at most; then nobody waits any more."""
    for _ in range(3):
        assert set(in_time(tier, keys)) <= {Reason.TIMEOUT, Reason.IO_ERROR}
    assert tier.stats()["breaker_open"] == 1
    assert tier.match(keys) == 0
    begun = time.monotonic()
    assert tier.ask(keys, deadline=time.monotonic() + 5) is None
    assert in_time(tier, keys) == [Reason.BREAKER_OPEN] * len(keys)
    assert time.monotonic() - begun < REST_S


def resumes(tier: RemoteTier, work: Callable[[], bool]) -> None:
    """The work succeeds again, with nobody's help, once the breaker has rested."""
    servers.until(work, "traffic resumes", 15)
    assert tier.stats()["breaker_open"] == 0


def stored(tier: RemoteTier, keys: np.ndarray) -> bool:
    return set(write(tier, keys, timeout=2)) == {None}


def test_killed_and_restarted_empty(victim: Victim) -> None:
    keys = fresh(PACK)
    with victim.opened() as tier:
        resumes(tier, lambda: stored(tier, keys))  # the first call also connects
        assert loaded(tier, keys) == PACK
        victim.server.kill()
        opens_within_three(tier, keys)
        victim.server.start()
        resumes(tier, lambda: set(in_time(tier, keys)) == {Reason.ABSENT})
        assert tier.match(keys) == 0, "what proved absent must not be promised"
        resumes(tier, lambda: stored(tier, keys))  # SeaweedFS answers before it has room
        assert loaded(tier, keys) == PACK


def test_frozen_and_thawed(victim: Victim) -> None:
    keys, others = fresh(PACK), fresh(PACK)
    with victim.opened() as tier:
        resumes(tier, lambda: stored(tier, keys))  # the first call also connects
        victim.server.freeze()
        begun = time.monotonic()
        assert set(write(tier, others, timeout=0.5)) <= {Reason.TIMEOUT, Reason.IO_ERROR, Reason.BREAKER_OPEN}
        assert time.monotonic() - begun < 0.5 + 2 * LIMITS.timeout_s + GRACE_S
        for _ in range(3):
            in_time(tier, keys)
        stats = tier.stats()
        assert stats["breaker_open"] == 1
        if "free_lanes" in stats:
            assert stats["abandoned_calls_total"] >= 1
        victim.server.thaw()
        resumes(tier, lambda: set(in_time(tier, keys)) == {None})
        assert stored(tier, others)


@pytest.mark.parametrize("victim", ["valkey", "mooncake"], indirect=True)
def test_lookups_of_a_frozen_store_end_in_time(victim: Victim) -> None:
    with victim.opened() as tier:
        assert ask(tier, fresh(PACK)) == 0
        victim.server.freeze()
        for _ in range(3):
            begun = time.monotonic()
            assert ask(tier, fresh(PACK), timeout=5) == 0
            assert time.monotonic() - begun < LIMITS.lookup_timeout_s + GRACE_S
        assert tier.stats()["breaker_open"] == 1
        assert tier.ask(fresh(PACK), deadline=time.monotonic() + 5) is None
        victim.server.thaw()
        resumes(tier, lambda: stored(tier, fresh(PACK)))


@pytest.mark.parametrize("victim", ["valkey", "mooncake"], indirect=True)
def test_many_requests_of_a_dead_store_end_in_time(victim: Victim) -> None:
    """More waits than the tier has threads: those that never get their turn end by their deadline as well."""
    keys = fresh(20 * PACK)
    with victim.opened(LIMITS._replace(timeout_s=5.0)) as tier:
        resumes(tier, lambda: stored(tier, keys))  # the first call also connects
        victim.server.freeze()
        begun = time.monotonic()
        # What was answered before the server stopped is right, too.
        failed = set(in_time(tier, keys, 1.0)) - {None}
        assert failed
        assert failed <= {Reason.TIMEOUT, Reason.IO_ERROR, Reason.BREAKER_OPEN}
        assert time.monotonic() - begun < 1.0 + GRACE_S
        victim.server.thaw()


@pytest.mark.parametrize("victim", ["valkey", "mooncake"], indirect=True)  # SeaweedFS takes long to come back
def test_down_when_opened(victim: Victim) -> None:
    victim.server.kill()
    keys = fresh(PACK)
    with victim.opened() as tier:
        assert ask(tier, keys) == 0
        assert set(write(tier, keys, timeout=1)) <= {Reason.IO_ERROR, Reason.BREAKER_OPEN, Reason.TIMEOUT}
        victim.server.start()
        resumes(tier, lambda: stored(tier, keys))
        assert loaded(tier, keys) == PACK


def test_slow_and_fast_again(victim: Victim) -> None:
    keys = fresh(8 * PACK)
    if victim.through is None:
        pytest.skip("a proxy cannot stand between its peers")
    with Proxy(victim.server.ports[0]) as proxy:
        slow = victim._replace(place=victim.through(proxy.port))
        with slow.opened() as tier:
            resumes(tier, lambda: stored(tier, keys))  # the first call also connects
            assert loaded(tier, keys) == len(keys)
            proxy.bytes_per_s = 20_000  # an object takes a second, and may take 0.4
            for _ in range(3):
                assert None not in in_time(tier, keys[:PACK])
            assert tier.stats()["breaker_open"] == 1
            proxy.bytes_per_s = None
            resumes(tier, lambda: set(in_time(tier, keys, 5)) == {None})


def test_cut_in_the_middle(victim: Victim) -> None:
    keys = fresh(PACK)
    if victim.through is None:
        pytest.skip("a proxy cannot stand between its peers")
    with Proxy(victim.server.ports[0]) as proxy:
        cut = victim._replace(place=victim.through(proxy.port))
        with cut.opened() as tier:
            resumes(tier, lambda: stored(tier, keys))  # the first call also connects
            proxy.cut_after = 10_000
            outcomes = [in_time(tier, keys) for _ in range(3)]
            assert None not in {outcome for each in outcomes for outcome in each}
            proxy.cut_after = None
            resumes(tier, lambda: set(in_time(tier, keys)) == {None})


def test_full_stores_nothing_more_and_still_serves(tmp_path: Path) -> None:
    server = servers.valkey(tmp_path, "--maxmemory", "4mb", "--maxmemory-policy", "noeviction")
    with servers.running(server), opened(Place(f"valkey://127.0.0.1:{server.ports[0]}", "valkey"), LIMITS) as tier:
        first = fresh(PACK)
        assert stored(tier, first)
        serves_when_full(tier, first, lambda: fresh(400 * PACK))  # 6.5 MB


def test_a_full_disk_stores_nothing_more_and_still_serves(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with opened(Place(f"file://{tmp_path}/shared", "files"), LIMITS) as tier:
        first = fresh(PACK)
        assert stored(tier, first)
        try:
            # The system then refuses what goes beyond it, as it does when a disk is full.
            resource.setrlimit(resource.RLIMIT_FSIZE, (6000, before[1]))
            serves_when_full(tier, first, lambda: fresh(4 * PACK))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        servers.until(lambda: stored(tier, fresh(PACK)), "stores are tried again")
    assert not list((tmp_path / "shared").glob(".cairn-tmp-*"))


def serves_when_full(tier: RemoteTier, first: np.ndarray, more: Callable[[], np.ndarray]) -> None:
    for _ in range(20):  # here and there an object finds room, and then the failures are not in a row
        outcomes = write(tier, more(), timeout=10)
        assert Reason.NO_SPACE in outcomes or Reason.BREAKER_OPEN in outcomes
        if tier.stats()["write_breaker_open"]:
            break
    assert tier.stats()["write_breaker_open"] == 1
    assert tier.stats()["breaker_open"] == 0
    tier._machine.known.clear()
    assert loaded(tier, first) == len(first)


def test_a_path_that_goes_away_and_comes_back(tmp_path: Path) -> None:
    root, aside = tmp_path / "shared", tmp_path / "aside"
    breaker = Breaker(cooldown_seconds=REST_S, longest_seconds=2 * REST_S)
    with opened(Place(f"file://{root}", "files"), LIMITS, breaker=breaker) as tier:
        keys = fresh(PACK)
        assert stored(tier, keys)
        root.rename(aside)
        root.write_bytes(b"a file where a directory should be")
        opens_within_three(tier, keys)
        root.unlink()
        aside.rename(root)
        resumes(tier, lambda: set(in_time(tier, keys)) == {None})


def test_unfinished_files_of_the_dead_are_swept(tmp_path: Path) -> None:
    from cairn.tier.remote.files import FileStore
    from cairn.tier.remote.sweep import DEAD_S, TEMPORARY

    store = FileStore(tmp_path / "shared")
    try:
        dead, alive = (tmp_path / "shared" / f"{TEMPORARY}{name}" for name in ("dead", "alive"))
        for path in (dead, alive):
            path.write_bytes(b"half")
        past = time.time() - DEAD_S - 60
        os.utime(dead, (past, past))
        assert store.sweep()
        assert (dead.exists(), alive.exists()) == (False, True)
    finally:
        store.close()


def test_a_sweep_that_hangs_keeps_nobody_from_closing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without its server interrupts no call."""
    from cairn.tier.remote import sweep

    begun, mended = threading.Event(), threading.Event()

    def hangs(*_: object) -> None:
        begun.set()
        assert mended.wait(120)

    monkeypatch.setattr(sweep, "INTERVAL_S", 0)
    monkeypatch.setattr(sweep, "CLOSE_S", 0.01)
    monkeypatch.setattr(sweep.Sweeper, "_sweep", hangs)
    closing = threading.Thread(target=sweep.Sweeper(tmp_path, None, None).close)
    try:
        assert begun.wait(30)
        closing.start()
        closing.join(30)
        assert not closing.is_alive()
    finally:
        mended.set()
        closing.join()


def test_the_longest_unused_files_go_first(tmp_path: Path) -> None:
    place = Place(f"file://{tmp_path}/shared", "files")
    prompts = [fresh(PACK) for _ in range(10)]
    with opened(place) as tier:
        for age, keys in enumerate(prompts):
            assert stored(tier, keys)
            for path in (tmp_path / "shared").rglob(f"{keys[-1].tobytes().hex()}"):
                past = time.time() - 1000 + age
                os.utime(path, (past, past))
    with opened(place, capacity_bytes=5 * 21_000) as tier:
        assert tier._store.sweep()  # type: ignore[attr-defined]
        tier._machine.known.clear()
        kept = [ask(tier, keys) == PACK for keys in prompts]
        assert kept == [False] * 6 + [True] * 4
        stats = tier.stats()
        assert (stats["resident_bytes"] <= 5 * 21_000, stats["swept_objects_total"]) == (True, 6)


def test_writes_that_give_way_to_loads_are_counted(tmp_path: Path) -> None:
    with opened(Place(f"file://{tmp_path}/shared", "files")) as tier:
        share = tier._machine.share
        share.begin_load()
        write(tier, fresh(PACK), timeout=0.2)
        share.end_load(0)
        assert tier.stats()["held_back_writes_total"] == 1


class Hanging(FileStore):
    """A file system that hangs, as an NFS mount whose server is gone: nothing returns while `held`."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.held = threading.Event()
        self.entered = threading.Semaphore(0)

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        self.entered.release()
        assert self.held.wait(60)
        return super().exists(names, deadline=deadline)


def test_who_asks_a_store_that_never_returns_does_not_wait_for_ever(tmp_path: Path) -> None:
    """Such a call tells the breaker nothing; the third who asks after it counts as stuck is not let wait."""
    store, keys, other = Hanging(tmp_path), fresh(4), fresh(4)
    with opened(store, LIMITS, breaker=Breaker(cooldown_seconds=60)) as tier:
        first = tier.ask(keys, deadline=soon(0.1))
        assert first is not None
        assert store.entered.acquire(timeout=30)
        while tier._scouts.longest_seconds() <= LIMITS.timeout_s + 1.0:
            time.sleep(0.05)
        asked = [tier.ask(other, deadline=soon(0.1)) for _ in range(5)]
        assert asked[2:] == [None] * 3
        assert tier.stats()["breaker_open"] == 1
        store.held.set()


class SlowAtFirst(FileStore):
    """Its first answer is late, as where a connection had to be made."""

    late_s = 0.2

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        time.sleep(self.late_s)
        self.late_s = 0.0
        return super().exists(names, deadline=deadline)


def test_one_late_answer_does_not_end_all_short_questions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are what would take it back. Nobody waits for the question that is asked though it does not pay."""
    with opened(SlowAtFirst(tmp_path), LIMITS) as tier:
        ask(tier, fresh(1))
        assert tier.ask(fresh(PACK), deadline=soon(), worth_s=0.05) is None
        assert tier.stats()["lookups_total"] == 1
        monkeypatch.setattr(pace, "AGAIN_S", 0.0)
        tier._machine.scout.pace.asked()  # as long ago as that

        def pays() -> bool:
            return tier.ask(fresh(PACK), deadline=soon(), worth_s=0.05) is not None

        servers.until(pays, "short lookups pay again")


class Raising(FileStore):
    """Breaks the contract of stores."""

    def exists(self, names: Sequence[bytes], *, deadline: float) -> list[bool] | Reason:
        raise ValueError("an answer that nobody foresaw")


def test_a_store_that_raises_keeps_no_rows(tmp_path: Path) -> None:
    """A write that cannot even be arranged is over, and gives back what it was to store, long before its deadline."""
    with opened(Raising(tmp_path), LIMITS) as tier:
        begun = time.monotonic()
        assert write(tier, fresh(PACK), timeout=20) == [Reason.IO_ERROR] * PACK
        assert time.monotonic() - begun < 10
