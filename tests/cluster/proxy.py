"""A way to a server that can be cut and mended, in the test's own event loop."""

import asyncio
import contextlib
from typing import Self


class Proxy:
    """`async with Proxy(port) as proxy`: listens on `proxy.port`."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._ways: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._open = True

    def cut(self) -> None:
        """Ends all connections, and takes no more."""
        self._open = False
        for way in self._ways:
            way.transport.abort()

    def mend(self) -> None:
        self._open = True

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self.cut()
        self._server.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task
        self._tasks.add(task)
        if not self._open:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        self._ways |= {writer, back}
        with contextlib.suppress(OSError):
            await asyncio.gather(_carry(reader, back), _carry(there, writer))


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    finally:
        writer.transport.abort()
