"""What every transport promises, with the owner of the memory in a process of its own."""

import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import numpy as np
import numpy.typing as npt
import pytest

from cairn.observe.reasons import Reason
from cairn.tier.arena import Arena
from cairn.transport import Read, Transport

SIZE = 40 << 20
WAIT_S = 60.0


class Owner:
    """See `tests.transport.owner`."""

    def __init__(self) -> None:
        self.name = f"test-{uuid.uuid4().hex}"
        command = [sys.executable, "-m", "tests.transport.owner", self.name, str(SIZE)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        self.endpoint, address = self.process.stdout.readline().split()
        self.address = int(address)
        self.memory = np.random.default_rng(0).integers(0, 256, (2, SIZE), np.uint8)

    def tell(self, what: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(f"{what}\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "done\n"

    def freeze(self) -> None:
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def close(self) -> None:
        self.kill()
        Arena.unlink(self.name)


@pytest.fixture(scope="module")
def transport() -> Iterator[Transport]:
    pytest.importorskip("mooncake.engine", exc_type=ImportError)
    from cairn.transport.mooncake import MooncakeTransport

    transport = MooncakeTransport("127.0.0.1")
    yield transport
    transport.close()


@pytest.fixture
def owner() -> Iterator[Owner]:
    owner = Owner()
    yield owner
    owner.close()


def soon(seconds: float = WAIT_S) -> float:
    return time.monotonic() + seconds


def some(size: int = 1 << 20) -> npt.NDArray[np.uint8]:
    return np.zeros(size, np.uint8)


def test_reads(transport: Transport, owner: Owner) -> None:
    """Of all sizes, at any address, many at once, and more than any buffer holds; only what is served, while it is."""
    numbers = np.random.default_rng(1)
    target = some(2 * SIZE)
    for count, longest in ((1, SIZE), (200, 9_000), (7, 5 << 20)):
        sizes = numbers.integers(1, longest, count) if count > 1 else np.array([SIZE])
        places = [int(numbers.integers(0, SIZE - size + 1)) for size in sizes]
        ends = np.cumsum(sizes)
        parts = [target[end - size : end] for end, size in zip(ends, sizes, strict=True)]
        target[:] = 0
        reads = [Read(owner.address + place, part.data) for place, part in zip(places, parts, strict=True)]
        assert transport.read(owner.endpoint, reads, deadline=soon()) is None
        for place, part in zip(places, parts, strict=True):
            assert np.array_equal(part, owner.memory[0, place : place + len(part)])
        assert not target[ends[-1] :].any()
    assert transport.read(owner.endpoint, [], deadline=soon()) is None

    behind = Read(owner.address + SIZE, some().data)
    assert transport.read(owner.endpoint, [behind], deadline=soon()) is Reason.IO_ERROR
    owner.tell("serve")
    assert transport.read(owner.endpoint, [behind], deadline=soon()) is None
    assert bytes(behind.into) == owner.memory[1, : 1 << 20].tobytes()
    owner.tell("withdraw")
    assert transport.read(owner.endpoint, [behind], deadline=soon()) is Reason.IO_ERROR


def test_who_is_frozen_costs_the_deadline_and_touches_nothing_after_it(transport: Transport, owner: Owner) -> None:
    target = some(SIZE)
    assert reads_until(owner.freeze, transport, owner, target, 1.0) is Reason.TIMEOUT
    target[:] = 0
    owner.process.send_signal(signal.SIGCONT)
    again, begun = some(), time.monotonic()
    while transport.read(owner.endpoint, [Read(owner.address, again.data)], deadline=soon()) is not None:
        assert time.monotonic() - begun < WAIT_S
    assert np.array_equal(again, owner.memory[0, : 1 << 20])
    assert not target.any()


def test_who_is_killed_is_an_error(transport: Transport, owner: Owner) -> None:
    assert reads_until(owner.kill, transport, owner, some(SIZE), WAIT_S) is Reason.IO_ERROR


def reads_until(
    event: Callable[[], None], transport: Transport, owner: Owner, target: npt.NDArray[np.uint8], seconds: float
) -> Reason:
    """Reads all that is served again and again, while something happens; how it failed, in time."""
    some_came, failed = threading.Event(), Future[Reason]()

    def run() -> None:
        reads = [Read(owner.address, target.data)]
        while (reason := transport.read(owner.endpoint, reads, deadline=soon(seconds))) is None:
            right = np.array_equal(target, owner.memory[0])
            target[:] = 0
            some_came.set()
            if not right:
                failed.set_exception(AssertionError("wrong bytes"))
                return
        failed.set_result(reason)

    threading.Thread(target=run).start()
    assert some_came.wait(WAIT_S)
    event()
    return failed.result(2 * WAIT_S)


def test_nobody_writes_into_guarded_memory(transport: Transport, owner: Owner) -> None:
    if not transport.guarded:
        pytest.skip("this transport cannot guard memory")
    from mooncake.engine import TransferEngine

    engine, source = TransferEngine(), some()
    assert engine.initialize("127.0.0.1", "P2PHANDSHAKE", "tcp", "") == 0
    assert engine.register_memory(source.ctypes.data, source.nbytes) == 0
    assert engine.transfer_sync_write(owner.endpoint, source.ctypes.data, owner.address, source.nbytes) != 0
    back = some()
    assert transport.read(owner.endpoint, [Read(owner.address, back.data)], deadline=soon()) is None
    assert np.array_equal(back, owner.memory[0, : 1 << 20])
