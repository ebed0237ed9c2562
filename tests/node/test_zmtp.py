"""ZeroMQ's protocol by hand: whole messages whatever the pieces, and ZeroMQ itself at the other end."""

import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.node.bell import Bell
from cairn.node.wire import MAX_FRAME
from cairn.node.zmtp import _GREETING, Dealer, ProtocolError, Router, _head, _Messages, _ready

TIMEOUT_S = 60.0
STARTED = _GREETING + _ready(b"DEALER")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "node.sock"


@pytest.fixture
def router(path: Path) -> Iterator[Router]:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    router = Router(listener, Bell())
    yield router
    router.close()


def heard(router: Router, count: int) -> list[tuple[Any, bytes]]:
    found: list[tuple[Any, bytes]] = []
    while len(found) < count:
        found += [(caller, bytes(message)) for caller, message in router.messages(TIMEOUT_S)]
    return found


@settings(deadline=None)
@given(st.lists(st.binary(max_size=700), max_size=20), st.lists(st.integers(1, 500), min_size=1))
def test_messages_are_whole_whatever_the_pieces(said: list[bytes], pieces: list[int]) -> None:
    stream = STARTED + b"".join(_head(len(one)) + one for one in said)
    welcomed: list[int] = []
    messages, found, at = _Messages(lambda: welcomed.append(at)), [], 0
    while at < len(stream):
        size = pieces[at % len(pieces)]
        found += [bytes(one) for one in messages.take(memoryview(stream)[at : at + size])]
        at += size
    assert found == said
    assert len(welcomed) == 1


@pytest.mark.parametrize("stream", [b"GET / HTTP/1.1\r\n" * 8, STARTED + _head(MAX_FRAME + 1)])
def test_what_is_no_protocol_is_hung_up_on(router: Router, path: Path, stream: bytes) -> None:
    with pytest.raises(ProtocolError):
        list(_Messages(lambda: None).take(memoryview(stream)))
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(str(path))
        stranger.sendall(stream)
        for _ in range(2):  # he is taken, and heard
            assert list(router.messages(TIMEOUT_S)) == []
        stranger.settimeout(TIMEOUT_S)
        while stranger.recv(100):  # what he was sent before
            continue


def connected(router: Router, path: Path, timeout: float = TIMEOUT_S) -> Dealer:
    with ThreadPoolExecutor(1) as pool:
        made = pool.submit(Dealer, path, timeout)
        while not made.done():
            list(router.messages(0.01))
        return made.result()


def test_whoever_is_slow_gets_all_that_is_kept_for_him_and_nobody_waits(router: Router, path: Path) -> None:
    dealer = connected(router, path)
    dealer.send(b"")
    [(caller, message)] = heard(router, 1)
    assert message == b""
    said = [bytes([i]) * (MAX_FRAME // 2) for i in range(5)]  # 4 MiB are kept, and what he could take at once
    for one in said:
        caller.send(one)
    found = []
    while len(found) < 5:
        list(router.messages(0))
        with suppress(BlockingIOError):
            found.append(dealer.recv(wait=False))
    assert found == said
    caller.send(b"later")
    dealer.close()
    assert list(router.messages(TIMEOUT_S)) == []
    caller.send(b"to nobody")


def test_whoever_is_too_slow_is_hung_up_on_and_misses_nothing_between(router: Router, path: Path) -> None:
    dealer = connected(router, path)
    dealer.send(b"")
    [(caller, _)] = heard(router, 1)
    said = [bytes([i]) * (MAX_FRAME // 2) for i in range(12)]
    for one in said:
        caller.send(one)
    found = []

    def listen() -> None:
        while True:
            list(router.messages(0))
            with suppress(BlockingIOError):
                found.append(dealer.recv(wait=False))

    with pytest.raises(ConnectionError):
        listen()
    assert found == said[: len(found)]
    assert len(found) < len(said)
    caller.send(b"to nobody")
    again = connected(router, path)
    again.send(b"here again")
    assert [message for _, message in heard(router, 1)] == [b"here again"]
    again.close()


def test_the_bell_wakes_who_waits() -> None:
    bell = Bell()
    bell.ring()
    bell.ring()
    bell.heard()
    with pytest.raises(BlockingIOError):
        bell.heard()


def test_zeromqs_own_dealer_calls(router: Router, path: Path) -> None:
    context = zmq.Context()
    own: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    try:
        own.connect(f"ipc://{path}")
        own.send(b"short")
        own.send(b"l" * 70_000)
        own.send_multipart([b"of", b"several"])
        found = heard(router, 3)
        assert [message for _, message in found] == [b"short", b"l" * 70_000, b""]
        for answer in (b"", b"x" * 255, b"y" * 256, b"z" * MAX_FRAME):
            found[0][0].send(answer)
        own.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        assert own.recv() == b""
        assert (own.recv(), own.recv()) == (b"x" * 255, b"y" * 256)
        while not own.poll(10):
            list(router.messages(0))
        assert own.recv() == b"z" * MAX_FRAME
    finally:
        context.destroy(linger=0)


def test_zeromqs_own_router_answers(path: Path) -> None:
    context = zmq.Context()
    own: zmq.Socket[bytes] = context.socket(zmq.ROUTER)
    try:
        own.bind(f"ipc://{path}")
        own.setsockopt(zmq.RCVTIMEO, int(TIMEOUT_S * 1000))
        dealer = Dealer(path, TIMEOUT_S)
        with pytest.raises(BlockingIOError):
            dealer.recv(wait=False)
        for message in (b"", b"a" * 300, b"b" * MAX_FRAME):
            dealer.send(message)
            who, found = own.recv_multipart()
            assert found == message
            own.send_multipart([who, message[:1000]])
            assert dealer.recv() == message[:1000]
        own.close(linger=0)
        with pytest.raises(ConnectionError):
            dealer.recv()
    finally:
        context.destroy(linger=0)


def test_who_listens_and_says_nothing_is_not_waited_for(router: Router, path: Path) -> None:
    with pytest.raises(TimeoutError):
        Dealer(path, 0.05)
    dealer = connected(router, path, 0.5)
    with pytest.raises(TimeoutError):
        dealer.recv()
    with pytest.raises(TimeoutError):
        dealer.send(bytes(MAX_FRAME))
