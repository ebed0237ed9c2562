"""The etcd client against members that die, freeze, forget and refuse: real ones, on loopback."""

import asyncio
import gc
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cairn.cluster.base import Change, Check, Listing, Put
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings, stream
from cairn.errors import ClosedError, ClusterError, InputError, UnclearError
from tests.certificates import make_certificates
from tests.cluster.etcd import DEADLINE_S, Cluster, etcd, needs_etcd
from tests.cluster.proxy import Proxy

pytestmark = needs_etcd

#: What a leader's end may cost: most of it is etcd's own election, of which a busy machine may need several.
RECOVERY_S = 10.0


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    """Three members; a test that kills one starts it again."""
    with etcd(3) as cluster:
        yield cluster


def registry_of(cluster: Cluster, **more: object) -> EtcdRegistry:
    return EtcdRegistry(EtcdSettings(endpoints=cluster.endpoints, **more))  # type: ignore[arg-type]


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, f"not in time: {what}"
        await asyncio.sleep(0.01)


async def put_once(registry: EtcdRegistry, key: str) -> None:
    """Creates a key exactly once, whatever breaks."""
    while True:
        try:
            await registry.transact([Check.absent(key)], [Put(key, b"")])
        except UnclearError:
            continue  # the check tells the next attempt
        except ClusterError:
            continue
        return


def test_no_event_is_lost_or_doubled_while_leaders_die(three: Cluster) -> None:
    async def read(endpoints: tuple[str, ...], since: Listing, seen: list[Change]) -> None:
        async with EtcdRegistry(EtcdSettings(endpoints=endpoints)) as registry:
            async for changes in registry.watch("/w/", since):
                seen.extend(changes)

    async def main() -> None:
        # One watch may go anywhere; of the others each stays with its member, dies with it, and is there again with it.
        ways = [three.endpoints, *((endpoint,) for endpoint in three.endpoints)]
        seen: list[list[Change]] = [[] for _ in ways]
        async with registry_of(three) as registry:
            since = await registry.range("/w/")  # for all: a reader that comes late begins there, too
            reading = [asyncio.ensure_future(read(way, since, found)) for way, found in zip(ways, seen, strict=True)]
            count, longest = 0, 0.0
            for _ in range(2):
                leader = await asyncio.to_thread(three.leader)
                for i in range(100):
                    if i == 40:
                        leader.kill()
                    begun = time.monotonic()
                    await put_once(registry, f"/w/{count:04}")
                    longest, count = max(longest, time.monotonic() - begun), count + 1
                leader.start()
            last = f"/w/{count - 1:04}"
            await until(lambda: all(changes and changes[-1].key == last for changes in seen), "all events")
        for changes in seen:
            assert [change.key for change in changes] == [f"/w/{i:04}" for i in range(count)]
            assert [change.revision for change in changes] == sorted({change.revision for change in changes})
        assert longest < RECOVERY_S
        for one in reading:
            one.cancel()
        await asyncio.wait(reading)

    asyncio.run(main())


def test_a_frozen_leader_costs_a_few_seconds(three: Cluster) -> None:
    async def main() -> None:
        leader = await asyncio.to_thread(three.leader)
        settings = EtcdSettings(endpoints=(leader.endpoint, *three.endpoints))
        async with EtcdRegistry(settings) as registry:
            while True:  # until the one in use is the leader
                await registry.get("/f/a")
                current = registry._caller.endpoints._current
                if current and current.target in leader.endpoint:
                    break
                registry._caller.endpoints._current = None
            watch = registry.watch("/f/", await registry.range("/f/"))
            await registry.put("/f/a", b"1")
            assert (await anext(watch))[0].key == "/f/a"
            leader.freeze()
            try:
                begun = time.monotonic()
                await put_once(registry, "/f/b")
                assert time.monotonic() - begun < RECOVERY_S
                changes = await asyncio.wait_for(anext(watch), 10)
                assert [change.key for change in changes] == ["/f/b"]
                assert registry.metrics.cluster_watch_resumes.value() == 1
                assert registry.metrics.cluster_failovers.value() >= 1
            finally:
                leader.signal(signal.SIGCONT)

    asyncio.run(main())


def test_without_a_majority_calls_end_at_their_deadline_and_it_goes_on_afterwards(three: Cluster) -> None:
    async def main() -> None:
        async with registry_of(three, timeout_s=1.5, attempt_s=0.5) as registry:
            watch = registry.watch("/m/", await registry.range("/m/"))
            await asyncio.to_thread(three.leader)
            down = three.members[:2]
            for member in down:
                member.kill()
            try:
                calls = (registry.get("/m/a"), registry.put("/m/a", b""), registry.grant(5))
                begun = time.monotonic()
                for error in await asyncio.gather(*calls, return_exceptions=True):
                    assert isinstance(error, ClusterError)
                    assert "has not answered in 1.5 s" in str(error)
                assert time.monotonic() - begun < 15
            finally:
                for member in down:
                    member.start()
            await asyncio.to_thread(three.leader)
            await put_once(registry, "/m/b")
            keys = [change.key for change in await asyncio.wait_for(anext(watch), 10)]
            assert keys[-1:] == ["/m/b"] or keys == ["/m/a"]  # a put that was given up may come late, once

    asyncio.run(main())


def test_endpoints_that_do_not_answer_cost_nothing(shared_etcd: tuple[Cluster, str]) -> None:
    cluster, prefix = shared_etcd
    with socket.socket() as silent, socket.socket() as closed:
        silent.bind(("127.0.0.1", 0))
        silent.listen(0)  # takes the connection and never answers
        closed.bind(("127.0.0.1", 0))  # refuses
        others = tuple(f"127.0.0.1:{one.getsockname()[1]}" for one in (silent, closed))
        endpoints = (*others, "192.0.2.1:2379", "no-such-host.invalid:2379", cluster.endpoints[0])

        async def main() -> None:
            async with EtcdRegistry(EtcdSettings(endpoints=endpoints, timeout_s=100, attempt_s=40)) as registry:
                begun = time.monotonic()
                await registry.put(f"{prefix}a", b"")
                assert time.monotonic() - begun < 20
            async with EtcdRegistry(EtcdSettings(endpoints=endpoints[:-1], timeout_s=1, attempt_s=0.3)) as registry:
                begun = time.monotonic()
                with pytest.raises(ClusterError, match="has not answered in 1 s"):
                    await registry.put("a", b"")
                assert time.monotonic() - begun < 10

        asyncio.run(main())


def test_a_name_is_resolved(shared_etcd: tuple[Cluster, str]) -> None:
    cluster, prefix = shared_etcd

    async def main() -> None:
        endpoint = f"localhost:{cluster.members[0].port}"
        async with EtcdRegistry(EtcdSettings(endpoints=(endpoint,))) as registry:
            assert await registry.put(f"{prefix}a", b"") > 0

    asyncio.run(main())


def test_a_watch_waits_for_no_end_of_its_stream(
    shared_etcd: tuple[Cluster, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """etcd tells none."""
    cluster, prefix = shared_etcd
    monkeypatch.setattr(stream, "_CLOSE_S", 300.0)

    async def main() -> None:
        async with registry_of(cluster) as registry:
            watch = registry.watch(prefix, await registry.range(prefix))
            await registry.put(f"{prefix}a", b"")
            assert (await anext(watch))[0].key == f"{prefix}a"
            await asyncio.wait_for(watch.close(), 60)

    asyncio.run(main())


def test_a_store_that_was_lost_is_told_as_the_difference() -> None:
    async def main(cluster: Cluster) -> None:
        member = cluster.members[0]
        async with registry_of(cluster) as registry:
            for name in "abc":
                await registry.put(f"/l/{name}", b"old")
            watch = registry.watch("/l/", await registry.range("/l/"))
            await registry.put("/l/d", b"old")
            assert (await anext(watch))[0].key == "/l/d"
            waiting = asyncio.ensure_future(anext(watch))
            member.kill()
            member.forget()
            member.start()
            await asyncio.to_thread(cluster.leader)
            member.put("/l/c", "new")
            member.put("/l/e", "new")
            told: dict[str, bytes | None] = {}
            while len(told) < 5:
                told |= {
                    change.key.removeprefix("/l/"): change.entry and change.entry.value
                    for change in await asyncio.wait_for(waiting, 10)
                }
                waiting = asyncio.ensure_future(anext(watch))
            assert told == {"a": None, "b": None, "d": None, "c": b"new", "e": b"new"}
            waiting.cancel()

    with etcd() as cluster:
        asyncio.run(main(cluster))


def test_compaction_while_the_watch_is_away(shared_etcd: tuple[Cluster, str]) -> None:
    cluster, prefix = shared_etcd
    member = cluster.members[0]

    async def main() -> None:
        async with (
            Proxy(member.port) as proxy,
            EtcdRegistry(EtcdSettings(endpoints=(f"127.0.0.1:{proxy.port}",))) as away,
            registry_of(cluster) as registry,
        ):
            await registry.put(f"{prefix}gone", b"")
            watch = away.watch(prefix, await away.range(prefix))
            await registry.put(f"{prefix}first", b"")
            assert [change.key for change in await anext(watch)] == [f"{prefix}first"]
            waiting = asyncio.ensure_future(anext(watch))
            proxy.cut()
            await until(lambda: not watch.connected, "the cut")
            for i in range(20):
                await registry.put(f"{prefix}x", str(i).encode())
            await registry.delete(f"{prefix}gone")
            revision = await registry.put(f"{prefix}x", b"last")
            await asyncio.to_thread(member.compact, revision)
            assert not waiting.done()
            proxy.mend()
            told = [(c.key, c.entry and c.entry.value) for c in await asyncio.wait_for(waiting, 10)]
            assert told == [(f"{prefix}gone", None), (f"{prefix}x", b"last")]
            await registry.put(f"{prefix}y", b"")
            assert [change.key for change in await asyncio.wait_for(anext(watch), 10)] == [f"{prefix}y"]
            assert away.metrics.cluster_watch_resumes.value(reason="compacted") == 1

    asyncio.run(main())


def test_a_transaction_on_a_broken_connection_is_unclear(shared_etcd: tuple[Cluster, str]) -> None:
    cluster, prefix = shared_etcd
    member = cluster.members[0]

    async def main() -> None:
        async with (
            Proxy(member.port) as proxy,
            EtcdRegistry(EtcdSettings(endpoints=(f"127.0.0.1:{proxy.port}",))) as registry,
        ):
            await registry.get("a")
            member.freeze()
            try:
                calls = [registry.transact([], [Put(f"{prefix}a", b"")]), registry.put(f"{prefix}b", b"")]
                waiting = [asyncio.ensure_future(call) for call in calls]
                await until(lambda: registry.metrics.cluster_retries.value() >= 1, "the attempts' end")
            finally:
                member.signal(signal.SIGCONT)
            with pytest.raises(UnclearError):
                await waiting[0]
            assert await waiting[1] > 0

    asyncio.run(main())


def test_a_token_that_has_expired_is_renewed() -> None:
    async def main(cluster: Cluster) -> None:
        member = cluster.members[0]
        for name, password in (("root", "r00t"), ("cairn", "sécret")):
            member.post("auth/user/add", name=name, password=password)
        member.post("auth/role/add", name="root")
        member.post("auth/role/add", name="mine")
        member.post("auth/role/grant", name="mine", perm={"permType": 2, "key": "L2Ev", "range_end": "L2Ew"})  # /a/
        member.post("auth/user/grant", user="root", role="root")
        member.post("auth/user/grant", user="cairn", role="mine")
        member.post("auth/enable")
        async with registry_of(cluster, username="cairn", password="sécret") as registry:
            await registry.put("/a/x", b"1")
            assert registry.metrics.cluster_logins.value() == 1
            watch = registry.watch("/a/", await registry.range("/a/"))
            grant = await registry.grant(60)
            await registry.put("/a/y", b"", grant.id)
            assert [change.key for change in await anext(watch)] == ["/a/y"]
            # A restart forgets most simple tokens, as their time does (5 min of silence): all log in again.
            member.kill()
            member.start()
            waiting = asyncio.ensure_future(anext(watch))
            await asyncio.gather(*(registry.put(f"/a/{i}", b"") for i in range(10)))
            told = list(await asyncio.wait_for(waiting, 10))
            while len(told) < 10:
                told += await asyncio.wait_for(anext(watch), 10)
            assert sorted(change.key for change in told) == [f"/a/{i}" for i in range(10)]
            logins = registry.metrics.cluster_logins.value()
            assert logins <= 4  # one for all calls that wait; none where etcd has read the old login from its log
            # By time alone, on a watch that begins with an old token.
            registry._caller.login._headers = (("token", "expired.1"),)
            fresh = registry.watch("/a/", await registry.range("/a/"))
            registry._caller.login._headers = (("token", "expired.2"),)
            waiting = asyncio.ensure_future(anext(fresh))
            await until(lambda: fresh.connected or waiting.done(), "the watch")
            await registry.put("/a/z", b"")
            assert [change.key for change in await asyncio.wait_for(waiting, 10)] == ["/a/z"]
            assert registry.metrics.cluster_logins.value() == logins + 2
            with pytest.raises(ClusterError, match=r"refuses.*permission denied"):
                await registry.put("/b/x", b"")
            with pytest.raises(ClusterError, match=r"refuses to watch /b/: .*permission denied"):
                await asyncio.wait_for(anext(registry.watch("/b/", await registry.range("/a/"))), 10)
        async with registry_of(cluster, username="cairn", password="wrong", timeout_s=100) as registry:
            begun = time.monotonic()
            with pytest.raises(ClusterError, match="authentication failed") as caught:
                await registry.get("/a/x")
            assert "wrong" not in str(caught.value)
            assert time.monotonic() - begun < 30
        async with registry_of(cluster) as registry:
            with pytest.raises(ClusterError, match=r"set cluster\.username"):
                await registry.get("/a/x")

    with etcd() as cluster:
        asyncio.run(main(cluster))


def test_tls_with_certificates_of_both_sides(tmp_path: Path) -> None:
    make_certificates(tmp_path)
    options = ("--cert-file", str(tmp_path / "server.pem"), "--key-file", str(tmp_path / "server.key"),
               "--client-cert-auth", "--trusted-ca-file", str(tmp_path / "ca.pem"))  # fmt: skip
    files = {"ca": tmp_path / "ca.pem", "cert": tmp_path / "client.pem", "key": tmp_path / "client.key"}

    async def main(cluster: Cluster) -> None:
        port = cluster.members[0].port
        for endpoint in (f"https://127.0.0.1:{port}", f"localhost:{port}"):
            async with EtcdRegistry(EtcdSettings(endpoints=(endpoint,), **files)) as registry:
                await registry.put("/t/a", b"1")
                watch = registry.watch("/t/", await registry.range("/t/"))
                await registry.put("/t/b", b"2")
                assert [change.key for change in await asyncio.wait_for(anext(watch), 10)] == ["/t/b"]
        wrong = (
            {"endpoints": (f"https://127.0.0.1:{port}",)},  # an authority that the system does not know
            {"endpoints": (f"https://127.0.0.1:{port}",), "ca": files["ca"]},  # no certificate of ours
            {"endpoints": (f"http://127.0.0.1:{port}",)},  # no TLS
        )

        async def refused(settings: dict[str, object]) -> None:
            async with EtcdRegistry(EtcdSettings(**settings, timeout_s=1, attempt_s=0.5)) as registry:  # type: ignore[arg-type]
                with pytest.raises(ClusterError, match="has not answered in 1 s"):
                    await registry.get("/t/a")

        await asyncio.gather(*map(refused, wrong))

    with etcd(1, *options, wait=False) as cluster:
        asyncio.run(main(cluster))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"endpoints": ()}, "no endpoint"),
        ({"endpoints": ("127.0.0.1",)}, "must be host:port"),
        ({"endpoints": ("127.0.0.1:99999",)}, "must be host:port"),
        ({"endpoints": ("ftp://127.0.0.1:1",)}, "must be host:port"),
        ({"endpoints": ("https://a:1",), "ca": Path("/nowhere/ca.pem")}, "cannot be read"),
        ({"endpoints": ("https://a:1",), "cert": Path("/nowhere/c.pem")}, "needs both files"),
    ],
)
def test_settings_that_cannot_be_used(settings: dict[str, object], message: str) -> None:
    async def main() -> None:
        with pytest.raises(InputError, match=message):
            EtcdRegistry(EtcdSettings(**settings))  # type: ignore[arg-type]

    asyncio.run(main())


def test_no_secret_is_shown() -> None:
    settings = EtcdSettings(endpoints=("a:1",), username="u", password="s3cret")
    assert "s3cret" not in f"{settings} {settings!r}"

    async def main() -> None:
        with pytest.raises(InputError) as caught:
            EtcdRegistry(EtcdSettings(endpoints=("http://user:s3cret@host:2379",)))
        assert "s3cret" not in str(caught.value)

    asyncio.run(main())


def test_closing_leaves_no_task_and_no_thread(shared_etcd: tuple[Cluster, str]) -> None:
    cluster, prefix = shared_etcd
    before = set(threading.enumerate())

    async def main() -> None:
        registry = registry_of(cluster, timeout_s=60.0, attempt_s=60.0)
        watch = registry.watch(prefix, await registry.range(prefix))
        waiting = asyncio.ensure_future(anext(watch, None))
        await until(lambda: watch.connected, "the watch")
        cluster.members[0].freeze()
        try:
            calls = [asyncio.ensure_future(registry.put(f"{prefix}a", b"")) for _ in range(50)]
            calls.append(asyncio.ensure_future(registry.keep_alive(1)))
            await asyncio.sleep(0)  # they begin
            await asyncio.wait_for(registry.close(), 60)
            ended = await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), 60)
        finally:
            cluster.members[0].signal(signal.SIGCONT)
        assert all(isinstance(one, ClosedError) for one in ended), ended
        assert await asyncio.wait_for(waiting, 60) is None
        me = asyncio.current_task()
        await until(lambda: asyncio.all_tasks() == {me}, "the tasks' end")

    asyncio.run(main())
    gc.collect()  # gRPC's thread ends with its last channel, and exceptions keep frames
    deadline = time.monotonic() + DEADLINE_S
    for thread in set(threading.enumerate()) - before:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert set(threading.enumerate()) <= before


def test_a_renewal_that_grpc_leaves_waiting_ends_with_the_registry(
    shared_etcd: tuple[Cluster, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a stream does whose channel is closed before it has begun."""
    cluster, prefix = shared_etcd

    async def main() -> None:
        registry = registry_of(cluster, timeout_s=300.0, attempt_s=300.0)
        await registry.range(prefix)
        begun = asyncio.Event()

        class Waits:
            async def write(self, _: object) -> None:
                begun.set()
                await asyncio.Event().wait()

            def cancel(self) -> None:
                pass

        for endpoint in registry._caller.endpoints._all:
            monkeypatch.setattr(endpoint, "_keep_alive", lambda **_: Waits())
        renewal = asyncio.ensure_future(registry.keep_alive(1))
        await begun.wait()
        await registry.close()
        with pytest.raises(ClosedError):
            await asyncio.wait_for(renewal, 60)

    asyncio.run(main())


def test_the_stubs_are_made_of_the_proto(tmp_path: Path) -> None:
    folder = Path(__file__).parents[2] / "src"
    name = "cairn/cluster/etcd/wire"
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{folder}", f"--descriptor_set_out={tmp_path}/wire.desc",
               f"--pyi_out={tmp_path}", str(folder / f"{name}.proto")]  # fmt: skip
    subprocess.run(command, check=True, timeout=60)
    assert (tmp_path / "wire.desc").read_bytes() == (folder / f"{name}.desc").read_bytes(), "run `make proto`"
    assert (tmp_path / f"{name}_pb2.pyi").read_text() == (folder / f"{name}_pb2.pyi").read_text(), "run `make proto`"
