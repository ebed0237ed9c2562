"""Our own publisher, as a subscriber finds it."""

import asyncio

import pytest

from cairn.errors import InputError
from cairn.fleet.base import Source
from cairn.fleet.instances import Instance, Limits
from cairn.fleet.publisher import Publisher
from cairn.fleet.subscriber import Subscriber
from tests.fleet.holder import Holder
from tests.fleet.peers import free_endpoint, until
from tests.fleet.wire_events import encode, stored

SOURCE = Source("own", 0)


@pytest.mark.parametrize("bind", [True, False])
def test_a_subscriber_gets_what_is_still_in_the_buffer_and_what_follows(bind: bool) -> None:
    endpoint, replay, holder = free_endpoint(), free_endpoint(), Holder()

    async def run() -> None:
        with Publisher(endpoint, replay, bind=bind, topic="kv", buffer=3) as publisher:
            numbers = [publisher.publish(encode([stored([i], [i], 1)])) for i in range(5)]
            assert numbers == [0, 1, 2, 3, 4]
            instance = Instance("own", endpoint, replay, bind=not bind, topic="kv")
            async with Subscriber(holder, [instance], limits=Limits(check_s=0.3)):
                await until(lambda: holder.hashes(SOURCE) == {2, 3, 4}, "the buffer")
                publisher.publish(encode([stored([5], [5], 1)]))
                await until(lambda: holder.hashes(SOURCE) == {2, 3, 4, 5}, "live")
        publisher.close()

    asyncio.run(run())
    assert holder.drops == []


def test_endpoints_that_cannot_be_used() -> None:
    taken = free_endpoint()
    with Publisher(taken):
        for endpoint, replay in ((taken, None), ("nonsense", None), (free_endpoint(), taken)):
            with pytest.raises(InputError, match="cannot be used"):
                Publisher(endpoint, replay)
