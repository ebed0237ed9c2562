"""What is shown of a cluster: who is there and who was, and what a host shares counted once."""

from typing import Any

import msgspec
import pytest

from cairn.cluster import CacheState, Instance, Load, TierState
from cairn.cluster.directory import Changed, Joined, Left
from cairn.cluster.directory import Member as Reported
from cairn.config.schema import Serve
from cairn.fleet import Source
from cairn.serve.dashboard import Board, Traffic
from cairn.serve.dashboard.traffic import Recent
from cairn.serve.gateway.members import Members
from cairn.serve.gateway.shown import ClusterShown


class Cluster:
    """Members as a directory would tell of them, and the board that shows them."""

    def __init__(self) -> None:
        self.members, self.traffic = Members(Serve()), Traffic()
        self.held = {Source("a", 0): 3, Source("a", 1): 4}
        self.board = Board(ClusterShown("x", self.members, self.traffic, lambda: 2, lambda: self.held, with_text=False))
        self._told: dict[str, Reported] = {}

    def tell(self, name: str, cache: CacheState | None = None, host: str = "h1", incarnation: str = "1") -> None:
        instance = Instance(name=name, incarnation=incarnation, http=f"http://{host}:8000", model="m")
        member = Reported(instance, Load(incarnation=incarnation, time=1.0, running=5, kv_usage=0.5), cache)
        before = self._told.get(name)
        self._told[name] = member
        self.members._hear(Joined(member) if before is None else Changed(member, before))

    def leave(self, name: str) -> None:
        self.members._hear(Left(self._told.pop(name)))

    def state(self) -> dict[str, Any]:
        self.board._source.look()
        self.board.sample()
        return dict(msgspec.json.decode(self.board.state()))

    def instances(self) -> dict[str, str]:
        return {one["name"]: one.get("state", "ready") for one in self.state()["instances"]}


def cache(hits: int, written: int, *, shared: bool, incarnation: str = "1") -> CacheState:
    dram = TierState(tier="dram", capacity_bytes=100, used_bytes=50, blocks=5, hit_tokens=hits, shared=shared)
    disk = TierState(tier="disk", capacity_bytes=900, used_bytes=90, blocks=9, store_bytes=written, shared=shared)
    return CacheState(incarnation=incarnation, time=1.0, tiers=(disk, dram), missed_tokens={"absent": hits})


@pytest.mark.parametrize("shared", [True, False])
def test_what_a_node_holds_and_writes_counts_once_a_host(shared: bool) -> None:
    cluster = Cluster()
    hosts = {"a": "h1", "b": "h1", "c": "h2"}
    for name, host in hosts.items():
        cluster.tell(name, cache(10, 1000, shared=shared), host)
    cluster.state()
    for name, host in hosts.items():
        cluster.tell(name, cache(30, 1700, shared=shared), host)
    state = cluster.state()
    homes = 2 if shared else 3
    tiers = {one["tier"]: (one["capacity_bytes"], one["used_bytes"], one["blocks"]) for one in state["tiers"]}
    assert tiers == {"dram": (100 * homes, 50 * homes, 5 * homes), "disk": (900 * homes, 90 * homes, 9 * homes)}
    assert [*tiers] == ["dram", "disk"]
    sample = state["samples"][-1]
    assert sample["store_bytes"] == {"disk": 700 * homes}
    assert (sample["hit_tokens"], sample["missed_tokens"]) == ({"dram": 60}, {"absent": 60})
    assert sample["waiting"] == 2
    assert {one["hit_rate"] for one in state["instances"]} == {0.5}


def test_instances_are_shown_as_they_stand_and_for_a_while_when_they_are_gone() -> None:
    cluster = Cluster()
    for name in "abc":
        cluster.tell(name)
    assert cluster.instances() == dict.fromkeys("abc", "ready")
    cluster.members.drain(cluster.members.members["a"], True)
    cluster.members.members["b"].failed(1e18)
    cluster.leave("c")
    assert cluster.instances() == {"a": "draining", "b": "resting", "c": "gone"}
    cluster.tell("c", incarnation="2")
    assert cluster.instances()["c"] == "ready"
    for i in range(40):
        cluster.tell(f"x{i:02}")
        cluster.state()
        cluster.leave(f"x{i:02}")
    gone = [name for name, state in cluster.instances().items() if state == "gone"]
    assert gone == [f"x{i}" for i in range(24, 40)]
    shown = cluster.state()["instances"][0]
    assert (shown["indexed_blocks"], shown["running"], shown["kv_usage"]) == (7, 5, 0.5)


def test_who_tells_nothing_of_a_cache_counts_as_the_router_expected() -> None:
    cluster = Cluster()
    cluster.tell("a")
    cluster.tell("b", cache(10, 0, shared=False))
    cluster.state()
    cluster.traffic.answered_at("a", 100, {"vram": 60}, None)
    cluster.traffic.answered_at("b", 100, {"vram": 99}, None)
    cluster.tell("b", cache(20, 0, shared=False))
    state = cluster.state()
    sample = state["samples"][-1]
    assert sample["hit_tokens"] == {"vram": 60, "dram": 10}
    assert sample["missed_tokens"] == {"absent": 50}
    assert [one.get("measured", False) for one in state["instances"]] == [False, True]
    assert [one["hit_rate"] for one in state["instances"]] == [0.6, 0.5]


def test_the_tree_is_of_the_latest_prompts_whoever_has_looked_before() -> None:
    cluster = Cluster()
    for i in range(1, 6):
        for _ in range(2):
            cluster.traffic.remember(Recent(b"x" * 200, 200, 50, {}, "a"))
        state = cluster.state()
        assert ([one["requests"] for one in state["hot"]], state["prompts"]) == ([2 * i], 2 * i)
        if i == 3:
            cluster.board._source.look()  # nobody has looked for a while
