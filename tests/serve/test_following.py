"""Instances that come and go while the service runs, as a registry would make them; and how they are written down."""

import asyncio
import contextlib
import subprocess
import sys
import threading

import numpy as np
import pytest

from cairn.errors import InputError
from cairn.fleet import FleetIndex, Source, Speculation
from cairn.fleet.instances import Followed, Instance, Limits, parse_instance
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.publisher import Publisher
from cairn.serve.base import RequestError
from cairn.serve.indexer.following import Following
from cairn.serve.indexer.lookup import Lookup, Query
from cairn.serve.indexer.parts import rehearse
from tests.fleet.peers import free_endpoint, until
from tests.fleet.wire_events import encode, stored


def test_added_and_removed_at_run_time() -> None:
    rehearse()  # a compiler would take longer than is waited for
    index, speculation = FleetIndex(64), Speculation()
    following = Following(index, speculation, FleetMetrics(), Limits())
    lookup = Lookup(index, speculation, following)
    query = Query(np.arange(8, dtype=np.uint32))
    endpoint, replay = free_endpoint(), free_endpoint()

    async def run() -> None:
        registry: Followed = following
        with Publisher(endpoint, replay) as publisher:
            publisher.publish(encode([stored([1, 2], list(range(8)), 4)], rank=2))
            assert lookup.score(query).scores == {}
            await registry.add(Instance("a", endpoint, replay, model="m"))
            assert list(lookup.score(query).scores) == [Source("a", 0)]  # its rank is not told yet
            await until(lambda: index.held() == {Source("a", 2): 2}, "its events")
            assert lookup.score(query).scores[Source("a", 2)].score == 8
            assert lookup.score(query._replace(model="n")).scores == {}
            lookup.routed(query, "a", 2)
            with pytest.raises(InputError, match="followed already"):
                await registry.add(Instance("a", endpoint, replay))
            hashed = index.hashed(query.tokens)
            assert speculation.tokens([Source("a", 2)], hashed).tolist() == [8]
            await registry.remove("a")
            assert lookup.score(query).scores == {}
            assert index.held() == {}
            assert speculation.tokens([Source("a", 2)], hashed).tolist() == [0]
            with pytest.raises(RequestError, match="not followed"):
                lookup.routed(query, "a", None)
            await registry.remove("a")
            await registry.add(Instance("a", endpoint, replay))
            await until(lambda: index.held() == {Source("a", 2): 2}, "its events again")

    following.start()
    asyncio.run(run())
    following.close()
    following.close()


def test_every_instance_is_followed_whichever_thread_it_falls_to() -> None:
    rehearse()
    index, names = FleetIndex(64), ("w0", "w1", "w4", "w5")
    following = Following(index, Speculation(), FleetMetrics(), Limits(), threads=2)
    endpoints = {name: (free_endpoint(), free_endpoint()) for name in names}

    async def run() -> None:
        with contextlib.ExitStack() as stack:
            for endpoint in endpoints.values():
                publisher = stack.enter_context(Publisher(*endpoint))
                publisher.publish(encode([stored([1, 2], list(range(8)), 4)]))
            following.start([Instance(name, *endpoints[name]) for name in names[:-1]])
            await following.add(Instance(names[-1], *endpoints[names[-1]]))
            every = {Source(name, 0): 2 for name in names}
            await until(lambda: index.held() == every, "all events")
            assert [len(lane.states()) for lane in following._lanes] == [2, 2]
            with pytest.raises(InputError, match="followed already"):
                await following.add(Instance("w4", *endpoints["w4"]))
            await following.remove("w4")
            del every[Source("w4", 0)]
            assert index.held() == every
            assert set(following.sources()) == set(every)

    asyncio.run(run())
    following.close()
    assert not [one for one in threading.enumerate() if one.name.startswith("cairn-events")]


def test_an_endpoint_that_cannot_be_used_ends_the_start() -> None:
    following = Following(FleetIndex(64), Speculation(), FleetMetrics(), Limits())
    with pytest.raises(InputError, match="nonsense: cannot be connected to"):
        following.start([Instance("a", "nonsense")])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a=tcp://h:1", Instance("a", "tcp://h:1")),
        ("a=tcp://h:1,replay=tcp://h:2", Instance("a", "tcp://h:1", "tcp://h:2")),
        ("a=tcp://*:1,bind,rank=3", Instance("a", "tcp://*:1", bind=True, rank=3)),
        ("a-1=ipc:///x,topic=kv@a,model=org/m", Instance("a-1", "ipc:///x", topic="kv@a", model="org/m")),
    ],
)
def test_as_it_is_written(text: str, expected: Instance) -> None:
    assert parse_instance(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        *("", "a", "=tcp://h:1", "a=h:1", "a=tcp://h:1,rank=x", "a=tcp://h:1,rank=1,rank=2", "a=tcp://h:1,x=1"),
        "a=tcp://h:1,replay=h:2",
        "a=tcp://h:1,rank=" + "9" * 5000,
    ],
)
def test_written_wrongly(text: str) -> None:
    with pytest.raises(InputError, match="must be NAME=ENDPOINT"):
        parse_instance(text)


FOLLOWS = """
import time
from cairn.fleet import FleetIndex, Speculation
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.metrics import FleetMetrics
from cairn.fleet.publisher import Publisher
from cairn.jit import compiled
from cairn.serve.indexer.following import Following
from cairn.serve.indexer.parts import rehearse
from tests.fleet.peers import free_endpoint
from tests.fleet.wire_events import encode, stored

rehearse()
before, index, endpoint, replay = compiled(), FleetIndex(), free_endpoint(), free_endpoint()
following = Following(index, Speculation(), FleetMetrics(), Limits())
with Publisher(endpoint, replay) as publisher:
    for first in range(0, 5000, 500):
        names, tokens = list(range(first + 1, first + 501)), list(range(4 * first, 4 * first + 2000))
        publisher.publish(encode([stored(names, tokens, 4, parent_block_hash=first or None)]))
    following.start([Instance("a", endpoint, replay)])
    deadline = time.monotonic() + 60
    while sum(index.held().values()) < 5000 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert sum(index.held().values()) == 5000
    following.close()
print([name for name, count in compiled().items() if count > before.get(name, 0)])
"""


def test_no_event_waits_for_a_compiler() -> None:
    """What a rehearsal has not run is compiled, or read from the disk, by the first event that needs it."""
    done = subprocess.run([sys.executable, "-c", FOLLOWS], capture_output=True, text=True, timeout=240, check=False)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr
