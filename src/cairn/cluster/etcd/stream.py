"""The stream of one watch on one member, read so that a consumer's cancelled wait does not end it."""

import asyncio
from typing import Any, Final

import grpc.aio

from cairn.cluster.base import encode_key
from cairn.cluster.etcd import wire_pb2 as wire
from cairn.cluster.etcd.endpoint import Endpoint, Headers

#: Has a member end the stream when it has lost its leader, instead of leaving it silent.
_REQUIRE_LEADER: Final = (("hasleader", "true"),)

_CLOSE_S: Final = 1.0


class EndedError(Exception):
    """The stream is over."""


class WatchStream:
    """Open until `close`. A member that says nothing for `quiet_s` is asked for a sign; without one, it is over."""

    def __init__(self, endpoint: Endpoint, headers: Headers, quiet_s: float, answer_s: float) -> None:
        self.endpoint, self.headers = endpoint, headers
        self._quiet_s, self._answer_s = quiet_s, answer_s
        self._loop = asyncio.get_running_loop()
        self._call = endpoint.watch(metadata=(*headers, *_REQUIRE_LEADER))
        self._begun = False
        self._reading: asyncio.Task[Any] | None = None
        self._heard = self._loop.time()
        self._asked: float | None = None  # when, if a sign is awaited

    @property
    def live(self) -> bool:
        """Whether changes come: it has begun, and no sign is awaited."""
        return self._begun and self._asked is None

    async def begin(self, key: bytes, end: bytes, revision: int) -> wire.WatchResponse:
        """Watches [key, end) from `revision` on; the first answer. Raises EndedError, TimeoutError, AioRpcError."""
        create = wire.WatchCreateRequest(key=key, range_end=end, start_revision=revision, fragment=True)
        async with asyncio.timeout(self._answer_s):
            await self._write(wire.WatchRequest(create_request=create))
            answer = await self._read(self._answer_s)
        if answer is None:
            raise TimeoutError
        self._begun = not answer.canceled
        return answer

    async def next(self) -> wire.WatchResponse | None:
        """The next answer; None: none yet, call again. Raises EndedError, TimeoutError for silence, AioRpcError."""
        due = self._asked + self._answer_s if self._asked is not None else self._heard + self._quiet_s
        answer = await self._read(max(0.0, due - self._loop.time()))
        if answer is None and self._asked is not None:
            raise TimeoutError
        if answer is None:
            async with asyncio.timeout(self._answer_s):
                await self._write(wire.WatchRequest(progress_request=wire.WatchProgressRequest()))
            self._asked = self._loop.time()
        return answer

    def cancel(self) -> None:
        """Ends it without waiting."""
        self._call.cancel()

    async def close(self) -> None:
        """Ends it, and waits until what reads it has heard of that. The member is not waited for: etcd does not end a
        stream of which only our side has ended.
        """
        self._call.cancel()
        if self._reading:
            await asyncio.wait([self._reading], timeout=_CLOSE_S)
            if self._reading.done() and not self._reading.cancelled():
                self._reading.exception()  # of interest to nobody any more

    async def _write(self, request: wire.WatchRequest) -> None:
        try:
            await self._call.write(request)
        except asyncio.InvalidStateError:  # what gRPC says of a stream that is over
            raise EndedError(await self._why()) from None

    async def _read(self, timeout_s: float) -> wire.WatchResponse | None:
        if self._reading is None:
            self._reading = self._loop.create_task(self._call.read(), name="cairn etcd watch")
        await asyncio.wait([self._reading], timeout=timeout_s)
        if not self._reading.done():
            return None
        reading, self._reading = self._reading, None
        answer = None if reading.cancelled() else reading.result()
        if answer is None or answer is grpc.aio.EOF:
            raise EndedError(await self._why())
        self._heard, self._asked = self._loop.time(), None
        return answer  # type: ignore[no-any-return]

    async def _why(self) -> str:
        if self._call.cancelled() or not self._call.done():
            return "closed"
        return f"{(await self._call.code()).name}: {await self._call.details()}"


def bounds(prefix: str) -> tuple[bytes, bytes]:
    """First key and end of the range of a prefix, as etcd has them: the end b"\\0" means "all from there on"."""
    start = encode_key(prefix)
    head = start.rstrip(b"\xff")
    end = head[:-1] + bytes([head[-1] + 1]) if head else b"\0"
    return start or b"\0", end
