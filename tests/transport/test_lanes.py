"""Lanes: their memory, where the system or the client gives none."""

import mmap
import time
from typing import Any

import pytest

from cairn.observe.reasons import Reason
from cairn.transport.lanes import Call, Lane, Lanes

SMALL, LARGE = 1 << 20, 8 << 20


class Client:
    """Knows which addresses are registered; `code` is what it answers to whoever asks for that."""

    def __init__(self) -> None:
        self.registered: set[int] = set()
        self.code = 0

    def register_buffer(self, address: int, size: int) -> int:
        if self.code == 0:
            self.registered.add(address)
        return self.code

    def unregister_buffer(self, address: int) -> int:
        self.registered.remove(address)
        return 0


@pytest.mark.parametrize("who", ["system", "client"])
def test_memory_that_was_not_to_be_had_is_asked_for_again(who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    client, lanes = Client(), Lanes(1, "test-lane")

    def usable(size: int) -> Any:
        def work(lane: Lane, _: Call) -> bool:
            return len(lane.memory(client, size)) >= size and lane.address in client.registered

        return lanes.run(work, time.monotonic() + 20)

    def refuse(*_: Any) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    assert usable(SMALL) is True
    with monkeypatch.context() as less:
        if who == "system":
            less.setattr(mmap, "mmap", refuse)
        else:
            client.code = -600
        assert usable(LARGE) is Reason.IO_ERROR
        assert usable(SMALL) is Reason.IO_ERROR
    client.code = 0
    assert usable(SMALL) is True
    assert usable(LARGE) is True
    lanes.close()
