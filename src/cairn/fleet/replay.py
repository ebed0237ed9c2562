"""Asking a publisher for what it published before: the replay of vLLM's ZmqEventPublisher.

A DEALER sends ["", start (u64be)] to the publisher's ROUTER and gets ["", topic, sequence (u64be), payload] for every
batch from `start` on that is still in the buffer (older publishers: without the topic), then sequence -1 with an empty
payload. The ROUTER drops what the connection cannot take, so an answer may have holes, and may lack its end.
"""

import asyncio
from collections.abc import AsyncGenerator

import zmq
import zmq.asyncio

from cairn.fleet.messages import END, Framed, Inbox
from cairn.fleet.sockets import attach, make_socket


class ReplayTimeoutError(Exception):
    """The publisher has not answered, or not to the end, in time."""


async def replay(
    context: zmq.asyncio.Context,
    inbox: Inbox,
    endpoint: str,
    start: int,
    *,
    deadline: float,
    quiet_s: float,
    queue_messages: int,
) -> AsyncGenerator[Framed, None]:
    """What the publisher still has from sequence `start` on, in its order. To be closed (aclosing) when left early.

    deadline: by the loop's clock, seconds. quiet_s: how long the publisher may pause within it, seconds. Raises
    ReplayTimeoutError. What is no answer is skipped.
    """
    loop = asyncio.get_running_loop()
    # A socket for each question: late answers to an earlier one cannot get in.
    socket = make_socket(context, zmq.DEALER, queue_messages)
    try:
        attach(socket, endpoint, bind=False)
        await socket.send_multipart([b"", start.to_bytes(8, "big")])
        while True:
            left = min(quiet_s, deadline - loop.time())
            if left <= 0 or not await socket.poll(max(1, int(left * 1000))):
                raise ReplayTimeoutError
            messages = inbox.drain(socket).kept()
            for i in range(len(messages)):
                frames = messages.parts(i)
                if len(frames) not in (3, 4) or len(frames[-2]) != 8:
                    continue
                if frames[-2] == END:
                    return
                topic = frames[1] if len(frames) == 4 else b""
                yield Framed(topic, int.from_bytes(frames[-2], "big"), frames[-1])
    finally:
        socket.close()
