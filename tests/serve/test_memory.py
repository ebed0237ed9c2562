"""A service that ends and begins again, and a second replica: both know what publishers cannot tell any more."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from cairn.fleet.publisher import Publisher
from tests.fleet.peers import free_endpoint
from tests.fleet.valkey_server import Server
from tests.fleet.wire_events import encode, stored
from tests.serve.running import Service, until

BATCHES, BLOCK = 6, 4
PROMPT = list(range(BATCHES * BLOCK))


class Forgetful:
    """A publisher that can replay only its last two batches of one block each."""

    def __init__(self) -> None:
        self.endpoint, self.replay = free_endpoint(), free_endpoint()
        self.publisher = Publisher(self.endpoint, self.replay, buffer=2)
        self.options = ("--no-rpc", "--instance", f"a={self.endpoint},replay={self.replay}")

    def tell(self, service: Service) -> None:
        """Block by block, so that none is lost on the way."""
        for i in range(BATCHES):
            tokens = PROMPT[i * BLOCK : (i + 1) * BLOCK]
            self.publisher.publish(encode([stored([i + 1], tokens, BLOCK, parent_block_hash=i or None)]))
            service.wait_for_blocks("a", i + 1)


@pytest.fixture
def forgetful() -> Iterator[Forgetful]:
    made = Forgetful()
    try:
        yield made
    finally:
        made.publisher.close(0)


def test_from_a_snapshot(forgetful: Forgetful, tmp_path: Path) -> None:
    options = (*forgetful.options, "--set", f"index.snapshot={tmp_path}/snapshot")
    with Service(*options) as service:
        forgetful.tell(service)
        assert service.end() == 0
    with Service(*options) as service:
        service.wait_for_blocks("a", BATCHES)
        assert service.score(token_ids=PROMPT)["scores"]["a"]["tokens"]["vram"] == len(PROMPT)
    with Service(*forgetful.options) as service:  # without it
        until(lambda: bool(service.state("a")["sequence"]), "what the publisher can replay")
        assert service.score(token_ids=PROMPT)["scores"]["a"]["tokens"]["vram"] == 0


def test_from_another_replica(forgetful: Forgetful, tmp_path: Path) -> None:
    with Server(tmp_path) as valkey:
        options = (*forgetful.options, "--set", f"index.shared={valkey.url}", "--set", "index.shared_interval_s=0.2")
        with Service(*options) as first:
            forgetful.tell(first)
            until(lambda: bool(valkey.client().hlen("{cairn:default}:sources")), "the first copy")
            with Service(*options) as second:
                second.wait_for_blocks("a", BATCHES)
                assert second.score(token_ids=PROMPT)["scores"]["a"]["tokens"]["vram"] == len(PROMPT)
