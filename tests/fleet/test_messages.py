"""What waits in a socket, taken by one call: frame for frame what was sent."""

from collections.abc import Iterator

import pytest
import zmq
import zmq.asyncio
from hypothesis import given
from hypothesis import strategies as st

from cairn.fleet import messages as module
from cairn.fleet.messages import Framed, Inbox, Messages
from cairn.fleet.msgpack import PADDING, Payloads
from cairn.fleet.wire import MAX_PAYLOAD

Pipe = tuple[zmq.Socket[bytes], zmq.asyncio.Socket]


@pytest.fixture(scope="module")
def pipe() -> Iterator[Pipe]:
    """Two ends in one process: what is sent is there at once."""
    context = zmq.Context()
    give: zmq.Socket[bytes] = context.socket(zmq.PAIR)
    take = zmq.asyncio.Context(context).socket(zmq.PAIR)
    for socket in (give, take):
        socket.set_hwm(0)
    give.bind("inproc://pipe")
    take.connect("inproc://pipe")
    yield give, take
    take.close(linger=0)
    context.destroy(linger=0)


@pytest.fixture(scope="module")
def inbox() -> Inbox:
    return Inbox()


def batch(sequence: int, payload: bytes = b"x") -> list[bytes]:
    return [b"", sequence.to_bytes(8, "big"), payload]


def read(messages: Messages) -> list[list[bytes]]:
    return [messages.parts(i) for i in range(len(messages))]


@given(st.lists(st.lists(st.binary(max_size=40), min_size=1, max_size=7), max_size=20))
def test_messages_come_as_they_were_sent(pipe: Pipe, inbox: Inbox, sent: list[list[bytes]]) -> None:
    give, take = pipe
    for frames in sent:
        give.send_multipart(frames)
    messages = inbox.drain(take)
    kept = messages.kept()
    assert kept.kept() is kept
    assert not len(inbox.drain(take))
    assert read(kept) == [frames if len(frames) <= 4 else [] for frames in sent]


@given(
    st.lists(st.sampled_from([batch(5), batch(6), batch(7), batch((1 << 64) - 1), [b"a"], batch(6)[:2]])),
    st.integers(0, 3),
)
def test_what_goes_on(pipe: Pipe, inbox: Inbox, sent: list[list[bytes]], first: int) -> None:
    give, take = pipe
    for frames in sent:
        give.send_multipart(frames)
    messages = inbox.drain(take)
    expected = 0
    while first + expected < len(sent) and sent[first + expected] == batch(5 + expected):
        expected += 1
    found = messages.going_on(first, 5)
    assert found == expected
    part = messages.part(first, first + found)
    assert [part.framed(i) for i in range(found)] == [Framed(b"", 5 + i, b"x") for i in range(found)]
    assert [part.payloads().one(i) for i in range(found)] == [b"x"] * found


def test_a_round_is_bounded_in_messages_and_in_bytes(pipe: Pipe, inbox: Inbox) -> None:
    give, take = pipe
    for i in range(300):
        give.send_multipart(batch(i))
    counts = [len(inbox.drain(take)) for _ in range(3)]
    assert counts == [256, 44, 0]
    payload = bytes(module._ROUND_BYTES // 4)
    for i in range(9):
        give.send_multipart(batch(i, payload))
    counts = [len(inbox.drain(take)) for _ in range(4)]
    assert counts == [4, 4, 1, 0]


def test_the_largest_payload_comes_whole_behind_a_round_of_others(pipe: Pipe, inbox: Inbox) -> None:
    give, take = pipe
    large = bytes(range(256)) * (MAX_PAYLOAD // 256)
    give.send_multipart(batch(0, bytes(module._ROUND_BYTES - 100)))
    give.send_multipart([large, *batch(1)[:2], large])
    messages = inbox.drain(take)
    assert [len(frames) for frames in read(messages)] == [3, 4]
    assert messages.parts(1) == [large, *batch(1)[:2], large]


def test_what_does_not_fit_is_no_message(pipe: Pipe, inbox: Inbox) -> None:
    """Within a process nothing bounds a message; a transport has a limit of its own."""
    give, take = pipe
    give.send_multipart(batch(0, bytes(len(inbox._memory))))
    give.send_multipart(batch(1))
    messages = inbox.drain(take)
    assert [messages.framed(i) for i in range(len(messages))] == [None, Framed(b"", 1, b"x")]


@given(st.lists(st.binary(max_size=30), min_size=1, max_size=5))
def test_payloads_from_elsewhere(parts: list[bytes]) -> None:
    payloads = Payloads.of(parts)
    assert [payloads.one(i) for i in range(len(parts))] == parts
    assert payloads.sizes.tolist() == [len(part) for part in parts]
    assert len(payloads.memory) == sum(map(len, parts)) + PADDING
    framed = Framed(b"topic", 7, parts[0])
    assert Messages.of(framed).framed(0) == framed
    assert Messages.of(framed).payloads().one(0) == parts[0]
