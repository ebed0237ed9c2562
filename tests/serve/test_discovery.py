"""A service that is told of no instances follows those that register in etcd."""

import asyncio
import shutil

import pytest

from cairn.cluster import Events, Instance, Keys, Registration
from cairn.cluster.etcd import EtcdRegistry, EtcdSettings
from cairn.fleet.publisher import Publisher
from tests.cluster.etcd import etcd
from tests.fleet.peers import free_endpoint
from tests.fleet.wire_events import encode, stored
from tests.serve.running import Service, until

PROMPT = list(range(8))


@pytest.mark.skipif(shutil.which("etcd") is None, reason="no `etcd` here: apt-get install etcd-server")
def test_registered_instances_are_followed() -> None:
    endpoint, replay = free_endpoint(), free_endpoint()
    told = Instance(
        name="a",
        incarnation="1",
        http="http://127.0.0.1:1",
        model="m",
        events=(Events(endpoint=endpoint, replay=replay),),
    )
    publisher = Publisher(endpoint, replay)
    publisher.publish(encode([stored([1, 2], PROMPT, 4)]))
    try:
        with etcd() as cluster, Service("--no-rpc", "--etcd-addr", ",".join(cluster.endpoints)) as service:

            async def main() -> None:
                settings = EtcdSettings(endpoints=cluster.endpoints)
                async with EtcdRegistry(settings) as registry:
                    async with Registration(registry, Keys().instance("a"), told, 10):
                        await asyncio.to_thread(service.wait_for_blocks, "a", 2)
                        assert service.score(token_ids=PROMPT, model="m")["scores"]["a"]["tokens"]["vram"] == 8
                    await asyncio.to_thread(until, lambda: service.state("a") == {"blocks": 0}, "its leaving")

            asyncio.run(main())
            assert service.end() == 0
    finally:
        publisher.close(0)
