"""`cairn register` and `cairn cluster` on a real etcd, in processes of their own."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.cluster.engine import Engine
from tests.cluster.etcd import DEADLINE_S, Cluster, etcd, needs_etcd

from cairn.cluster import HostNode, Keys, Replica
from cairn.cluster.values import encode

Run = Callable[..., subprocess.CompletedProcess[str]]

NOBODY = {"instances": {}, "replicas": {}, "nodes": {}, "leader": None, "slo": {}}
CAIRN = [sys.executable, "-c", "from cairn.cli import main; main()"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with etcd() as cluster:
        yield cluster


def listing(run: Run, cluster: Cluster) -> dict[str, Any]:
    ended = run("cluster", "list", "--json", "--etcd-addr", cluster.endpoints[0])
    assert ended.returncode == 0, ended.stderr
    found: dict[str, Any] = json.loads(ended.stdout)
    return found


@needs_etcd
def test_an_engine_is_registered_shown_and_forgotten(run: Run, cluster: Cluster) -> None:
    address = cluster.endpoints[0]
    register = [*CAIRN, "register", "--name", "a", "--role", "MIX", "--events", "tcp://10.0.0.1:5557", "--ranks", "2",
                "--period", "0.1", "--etcd-addr", address, "--set", "cluster.lease_s=2"]  # fmt: skip
    watch = [*CAIRN, "cluster", "watch", "--json", "--reports", "--etcd-addr", address]
    with (
        Engine() as engine,
        subprocess.Popen([*watch, "--seconds", "60"], stdout=subprocess.PIPE, text=True) as watcher,
        subprocess.Popen([*register, "--http", engine.url], stdout=subprocess.PIPE, text=True) as first,
    ):
        try:
            assert watcher.stdout
            assert first.stdout
            events = (json.loads(line) for line in watcher.stdout)
            joined = next(events)
            assert (joined["event"], joined["name"]) == ("joined", "a")
            while joined["load"] is None:
                joined = next(events)
            shown = listing(run, cluster)["instances"]["a"]["instance"]
            assert (shown["role"], shown["model"], shown["block_tokens"]) == ("MIX", "tiny", 32)
            assert [one["endpoint"] for one in shown["events"]] == ["tcp://10.0.0.1:5557", "tcp://10.0.0.1:5558"]
            assert first.stdout.readline() == f"a: registered as {shown['incarnation']}\n"
            for undo in ((), ("--undo",)):
                told = run("cluster", "drain", "a", *undo, "--etcd-addr", address)
                assert (told.returncode, told.stdout, told.stderr) == (0, "", "")
                assert next(one for one in events if one["draining"] is not bool(undo))["event"] == "changed"
            first.kill()
            assert next(one for one in events if one["event"] != "changed")["event"] == "left"
            assert listing(run, cluster) == NOBODY
            lasting = [*register[:-1], "cluster.lease_s=300", "--http", engine.url]
            with subprocess.Popen(lasting, stdout=subprocess.PIPE, text=True) as second:
                rejoined = next(events)
                assert (rejoined["event"], rejoined["name"]) == ("joined", "a")
                assert rejoined["instance"]["incarnation"] != shown["incarnation"]
                second.send_signal(signal.SIGTERM)
                # At once, and not when the lease ends.
                assert next(one for one in events if one["event"] != "changed")["event"] == "left"
                assert second.wait(DEADLINE_S) == 0
        finally:
            watcher.kill()
            first.kill()


@needs_etcd
def test_the_slo_is_set_for_all_and_unset(run: Run, cluster: Cluster) -> None:
    at = ("--etcd-addr", cluster.endpoints[0], "--namespace", "slos")
    for options, shown in ((("--ttft-s", "1.5"), {"ttft_s": 1.5}), ((), {})):
        assert run("cluster", "slo", *options, *at).returncode == 0
        assert json.loads(run("cluster", "list", "--json", *at).stdout)["slo"] == shown
    cluster.members[0].put(Keys("slos").setting("slo"), "no JSON")
    assert json.loads(run("cluster", "list", "--json", *at).stdout)["slo"] == {}


@needs_etcd
def test_replicas_and_nodes_are_listed_in_a_table_for_people(run: Run, cluster: Cluster) -> None:
    keys = Keys("people")
    node = HostNode(incarnation="1", name="10.0.0.1:8700", peers="tcp://10.0.0.1:8700")
    replica = Replica(incarnation="2", name="s", http="http://10.0.0.2:9888")
    cluster.members[0].put(keys.node("10.0.0.1:8700"), encode(node).decode())
    cluster.members[0].put(keys.replica("s"), encode(replica).decode())
    ended = run("cluster", "list", "--etcd-addr", cluster.endpoints[0], "--namespace", "people")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert "cairn cluster list" in ended.stdout
    assert "tcp://10.0.0.1:8700" in ended.stdout
    assert "http://10.0.0.2:9888" in ended.stdout


AT_NOWHERE = ("--etcd-addr", "127.0.0.1:1")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("cluster", "list"), 2, "cluster.etcd_addr is empty"),
        (("cluster", "list", "--etcd-addr", "nonsense"), 2, "'nonsense': must be host:port"),
        (("cluster", "list", *AT_NOWHERE, "--set", "cluster.timeout_s=0.5"), 1, "has not answered in 0.5 s"),
        (("cluster", "drain", "a", *AT_NOWHERE, "--set", "cluster.timeout_s=0.5"), 1, "has not answered in 0.5 s"),
        (("cluster", "slo", "--ttft-s", "nan", *AT_NOWHERE), 2, "serve.slo.ttft_s"),
        (("register", "--name", "a/b", "--http", "http://a:1", *AT_NOWHERE), 2, "Instance a/b"),
        (("register", "--name", "a", "--http", "a:1", *AT_NOWHERE), 2, "must be an address such as"),
        (("register", "--name", "a", "--http", "http://a:1", *AT_NOWHERE, "--role", "BOSS"), 2, "BOSS: no role"),
        (("register", "--name", "a", "--http", "http://a:1", *AT_NOWHERE, "--events", "tcp://*:5"), 2, "engine binds"),
    ],
)
def test_mistakes_end_in_one_line(run: Run, arguments: tuple[str, ...], code: int, message: str) -> None:
    ended = run(*arguments)
    assert ended.returncode == code
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1
