"""A service as a process: uvicorn on a socket of ours, signals, and an end that is bounded in time."""

import asyncio
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

import uvicorn
from starlette.types import ASGIApp

from cairn.errors import InputError
from cairn.observe.http import address
from cairn.serve.inbound import Connection

#: How long a thread may keep the interpreter's lock while another waits for it, seconds. Python's 5 ms would be what a
#: lookup waits whenever events come in.
SWITCH_S: Final = 0.0005

_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
#: How long a process that does not serve yet may live on after a signal, seconds, and its exit code then: what it waits
#: for (kernels that are compiled, a tokenizer) hears of no signal, and nobody's request is lost.
_STARTING_S: Final = 1.0
_INTERRUPTED: Final = 130
_CONNECTIONS: Final = 4096


class Server(uvicorn.Server):
    """uvicorn without its own handling of signals: gRPC ends with it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def settings(app: ASGIApp, grace_s: float, *, keep_alive_s: int = 5) -> uvicorn.Config:
    """grace_s: for requests that are being served at the end. keep_alive_s: for idle connections."""
    return uvicorn.Config(
        app,
        loop="none",
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=_CONNECTIONS,
        timeout_keep_alive=keep_alive_s,
        timeout_graceful_shutdown=max(1, round(grace_s)),
    )


async def until_begun(http: uvicorn.Server, serving: asyncio.Task[None]) -> None:
    """Waits until it serves. Raises what its task raised."""
    while not http.started and not serving.done():
        await asyncio.sleep(0.01)
    if serving.done():
        await serving


class Ended(asyncio.Event):
    """Set by a signal. serving: said by whoever serves, once he does."""

    serving = False


@contextmanager
def ended_by_signals(patience_s: float) -> Iterator[Ended]:
    """An event that a signal sets, and a bound on how long the process lives on then."""
    ended, loop = Ended(), asyncio.get_running_loop()

    def end() -> None:
        if not ended.is_set():
            left_s, code = (patience_s, 1) if ended.serving else (min(_STARTING_S, patience_s), _INTERRUPTED)
            timer = threading.Timer(left_s, os._exit, (code,))
            timer.daemon = True
            timer.start()
        ended.set()

    for one in _SIGNALS:
        loop.add_signal_handler(one, end)
    try:
        yield ended
    finally:
        for one in _SIGNALS:
            loop.remove_signal_handler(one)


def listen(host: str, port: int, option: str = "--http-port") -> socket.socket:
    """A listening socket. Raises InputError, with the option that mends it, for what is in use or not this host's."""
    try:
        family, *_, found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(found[:2], family=family, backlog=2048)
    except OSError as error:
        where, why = address(host, port), os.strerror(error.errno) if error.errno and error.errno > 0 else str(error)
        raise InputError(f"HTTP on {where}: {why}; name another with {option} or --host") from None


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """For `asyncio.Runner`: uvloop, where there is one."""
    with contextlib.suppress(ImportError):  # there is none for Windows
        import uvloop

        return uvloop.new_event_loop
    return None
