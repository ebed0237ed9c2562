"""Nodes of several hosts, here all on one: what one has prefilled the others serve, whatever happens to it."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.node.peering import Discovery
from cairn.tier.peer import Peers
from cairn.tier.peer.wire import Keypair
from tests.cluster.conftest import one_etcd  # noqa: F401 - a fixture
from tests.cluster.etcd import Cluster
from tests.engine.pages import BLOCK, SLOT, namespace, prompt, retrieved, stored
from tests.ports import free_ports
from tests.tier.remote.servers import until

from .rig import ProcessNode, address_in

TOKENS: Final = 10 * BLOCK
SECRET: Final = "known to all of these hosts"
#: What nobody may hang beyond, on a busy machine.
HANG_S: Final = 30.0


class Host(ProcessNode):
    """A host: a node whose log goes to a file, as a transfer engine tells of every failure, and its address."""

    def __init__(self, home: Path, port: int, known: int, **settings: Any) -> None:
        home.mkdir(exist_ok=True)
        self.home = home
        settings = {
            "storage.cpu.size": 64 * SLOT,
            "node.peers.address": f"tcp://127.0.0.1:{port}",
            "node.peers.known": f"tcp://127.0.0.1:{known}",
            "node.peers.secret": SECRET,
            "node.peers.lookup_timeout_s": 10,
            "node.peers.timeout_s": 30,
            "node.timeout_s": 2,
        } | settings
        command = [sys.executable, "-c", "from cairn.cli import main; main()", "node", "--foreground"]
        command += ["--address", address_in(home)]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        with (home / "log").open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log)  # type: ignore[assignment]
        self.started.append(self)
        until(self.listens, "a node listens", 120)

    def listens(self) -> bool:
        assert self.process.poll() is None, (self.home / "log").read_text()
        return "listening" in (self.home / "log").read_text()

    @contextlib.contextmanager
    def engine(self) -> Iterator[CacheEngine]:
        overrides = {"engine.planner": False, "node.timeout_s": 2, "storage.remote.lookup_timeout_s": 10}
        config = load_config(environ={}, overrides=overrides)
        with CacheEngine(namespace(), config, node=address_in(self.home)) as engine:
            yield engine


@pytest.fixture(autouse=True)
def _needs_an_engine() -> None:
    pytest.importorskip("mooncake.engine", exc_type=ImportError)


def of_tier(engine: CacheEngine, tier: str, figure: str) -> float:
    stats: Any = engine.get_stats()
    return float(stats["tiers"].get(tier, {}).get(figure, 0))


def hits(engine: CacheEngine, tier: str) -> float:
    return engine.metrics.hit_tokens.value(tier=tier)


def test_what_one_has_prefilled_another_serves(tmp_path: Path) -> None:
    """And a third, which does not know the secret, gets nothing."""
    one, two, three = free_ports(3)
    tokens = prompt(1, TOKENS)
    owner, reader = Host(tmp_path / "one", one, two), Host(tmp_path / "two", two, one)
    stranger = Host(
        tmp_path / "three", three, one, **{"node.peers.secret": "what others know", "node.peers.lookup_timeout_s": 0.5}
    )
    with owner.engine() as first, reader.engine() as second, stranger.engine() as third:
        assert stored(first, tokens) == TOKENS
        assert retrieved(second, tokens) == TOKENS
        assert (hits(second, "peer"), hits(second, "dram")) == (TOKENS, 0)
        assert retrieved(second, tokens) == TOKENS
        assert hits(second, "dram") == TOKENS
        # What goes on from there is stored here, and read back there.
        longer = prompt(2, 2 * TOKENS)
        longer[:TOKENS] = tokens
        assert stored(second, longer) == TOKENS
        until(lambda: retrieved(first, longer) == 2 * TOKENS, "nobody remembers that it was not there")
        assert hits(first, "peer") == TOKENS
        until(lambda: of_tier(first, "dram", "pinned_blocks") == 0, "leases are given back")

        assert retrieved(third, tokens) == 0
        assert of_tier(third, "peer", "failed_lookups_total") == 1


class Readers:
    """Asks for prompts again and again, in threads, and looks at every byte. calls: how many are over."""

    def __init__(self, engine: CacheEngine, prompts: range, threads: int) -> None:
        self.calls = 0
        self.longest_s = 0.0
        self.failures: list[BaseException] = []
        self._engine, self._prompts = engine, prompts
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._run, args=(seed,)) for seed in range(threads)]

    def __enter__(self) -> "Readers":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(HANG_S)
            assert not thread.is_alive(), "a call hangs"

    def go_on(self, calls: int) -> None:
        """Waits for so many more."""
        before = self.calls
        until(lambda: self.calls >= before + calls or bool(self.failures), "calls return", 2 * HANG_S)
        assert not self.failures, self.failures

    def _run(self, seed: int) -> None:
        numbers = random.Random(seed)
        try:
            while not self._over.is_set():
                begun = time.monotonic()
                retrieved(self._engine, prompt(numbers.choice(self._prompts), TOKENS))
                with self._lock:
                    self.calls += 1
                    self.longest_s = max(self.longest_s, time.monotonic() - begun)
        except BaseException as error:  # noqa: BLE001 - told by `go_on`
            self.failures.append(error)


def test_whatever_happens_to_a_peer_no_byte_is_wrong_and_no_call_hangs(tmp_path: Path) -> None:
    """Two threads read from a peer that evicts under pressure, is frozen, is killed, and comes back empty."""
    ports = free_ports(2)
    prompts, fast = range(8), {"node.peers.timeout_s": 1.0, "node.peers.lookup_timeout_s": 0.3}
    owner = Host(tmp_path / "one", *ports, **{"storage.cpu.size": 100 * SLOT})
    # Too small to keep what it reads.
    reader = Host(tmp_path / "two", *reversed(ports), **{"storage.cpu.size": 24 * SLOT, **fast})
    with owner.engine() as first, reader.engine() as second:

        def store(seeds: range) -> None:
            for seed in seeds:
                stored(first, prompt(seed, TOKENS))

        def comes_again(readers: Readers) -> None:
            """From the peer, which is found again by itself."""
            enough = hits(second, "peer") + 5 * TOKENS
            until(lambda: hits(second, "peer") > enough or bool(readers.failures), "blocks come", 2 * HANG_S)

        store(prompts)
        with Readers(second, prompts, 2) as readers:
            comes_again(readers)
            for seed in range(100, 160):  # each takes the place of another
                store(range(seed, seed + 1))
                store(range(seed % 8, seed % 8 + 1))
            comes_again(readers)

            owner.process.send_signal(signal.SIGSTOP)
            readers.go_on(20)
            owner.process.send_signal(signal.SIGCONT)
            comes_again(readers)

            owner.process.send_signal(signal.SIGKILL)
            owner.process.wait()
            readers.go_on(20)
            owner = Host(tmp_path / "one", *ports, **{"storage.cpu.size": 100 * SLOT})
            readers.go_on(20)
            until(lambda: stored(first, prompt(0, TOKENS)) > 0, "the engine is back")
            store(prompts)
            comes_again(readers)
        assert not readers.failures
        assert readers.longest_s < HANG_S
        until(lambda: of_tier(second, "dram", "pinned_blocks") == 0, "nothing stays pinned")
        until(lambda: of_tier(first, "dram", "pinned_blocks") == 0, "nothing stays lent")


def test_nodes_find_each_other(one_etcd: Cluster) -> None:  # noqa: F811 - the fixture
    """Through the registry, beside those that they were told of; who leaves is forgotten."""
    overrides = {
        "cluster.etcd_addr": ",".join(one_etcd.endpoints),
        "cluster.namespace": f"peers-{os.getpid()}",
        "node.peers.known": "tcp://10.0.0.9:1",
    }
    config = load_config(environ={}, overrides=overrides)

    def known(peers: Peers) -> set[str]:
        return {peer.address for peer in peers.all()}

    addresses = [f"tcp://10.0.0.{number}:8700" for number in (1, 2)]
    both = [Peers(Keypair(SECRET)) for _ in addresses]
    discoveries = [Discovery(config, *pair) for pair in zip(addresses, both, strict=True)]
    try:
        until(lambda: known(both[0]) == {"tcp://10.0.0.9:1", addresses[1]}, "the first finds the second")
        until(lambda: known(both[1]) == {"tcp://10.0.0.9:1", addresses[0]}, "the second finds the first")
        discoveries.pop().close()
        until(lambda: known(both[0]) == {"tcp://10.0.0.9:1"}, "who left is forgotten")
    finally:
        for discovery in discoveries:
            discovery.close()
        for peers in both:
            peers.close()


def test_a_node_that_cannot_look_for_others_stops_in_order() -> None:
    """It has said so, and went on without them."""
    overrides = {"cluster.etcd_addr": "https://127.0.0.1:1", "cluster.ca": "/there/is/no/such.pem"}
    discovery = Discovery(load_config(environ={}, overrides=overrides), "tcp://10.0.0.1:8700", Peers(Keypair(SECRET)))
    discovery._thread.join(30)
    assert not discovery._thread.is_alive()
    discovery.close()
