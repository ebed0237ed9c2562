"""ZeroMQ sockets as the fleet uses them: bounded, without linger."""

import contextlib
from typing import Final

import zmq
import zmq.asyncio
from zmq.utils.monitor import parse_monitor_message

from cairn.errors import InputError
from cairn.fleet.wire import MAX_PAYLOAD

#: How often a silent peer is asked whether it lives, and how long it may take to answer, milliseconds.
_HEARTBEAT_MS: Final = 5_000

#: Longer, as pongs wait behind messages that the queue has no place for.
_HEARTBEAT_TIMEOUT_MS: Final = 30_000

#: Attempts to reconnect grow apart up to this, milliseconds.
_RECONNECT_MS: Final = 2_000

_WATCHED: Final = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED


def make_socket(context: zmq.asyncio.Context, kind: int, queue_messages: int) -> zmq.asyncio.Socket:
    """A socket that queues at most `queue_messages` and takes no message beyond MAX_PAYLOAD. Raises InputError where
    there are too many.
    """
    try:
        socket = context.socket(kind)
    except zmq.ZMQError as error:
        raise _too_many(error) from None
    socket.setsockopt(zmq.LINGER, 0)
    socket.setsockopt(zmq.RCVHWM, queue_messages)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_PAYLOAD)
    socket.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
    socket.setsockopt(zmq.HEARTBEAT_TIMEOUT, _HEARTBEAT_TIMEOUT_MS)
    socket.setsockopt(zmq.RECONNECT_IVL_MAX, _RECONNECT_MS)
    return socket


def watch(socket: zmq.asyncio.Socket) -> zmq.asyncio.Socket:
    """A socket that tells when peers of `socket` come and go, for `comings`: from now on, so before it is attached.
    Raises as `make_socket`.
    """
    try:
        return socket.get_monitor_socket(_WATCHED)
    except zmq.ZMQError as error:
        raise _too_many(error) from None


def _too_many(error: zmq.ZMQError) -> InputError:
    return InputError(f"no socket for one more publisher: {error.strerror}; raise `ulimit -n`")


def attach(socket: zmq.asyncio.Socket, endpoint: str, *, bind: bool) -> None:
    """Binds or connects. Raises InputError where the endpoint cannot be bound or is none."""
    if "[" in endpoint:
        socket.setsockopt(zmq.IPV6, 1)
    try:
        if bind:
            socket.bind(endpoint)
        else:
            socket.connect(endpoint)
    except zmq.ZMQError as error:
        what = "bound" if bind else "connected to"
        raise InputError(
            f"{endpoint}: cannot be {what}: {error.strerror}; name a free one, as tcp://host:5557"
        ) from None


def reattach(socket: zmq.asyncio.Socket, endpoint: str) -> None:
    """Begins to connect anew, where ZeroMQ may have given up."""
    with contextlib.suppress(zmq.ZMQError):  # nothing is left of the old connection
        socket.disconnect(endpoint)
    socket.connect(endpoint)


def comings(monitor: zmq.Socket[bytes]) -> list[bool]:
    """What has happened to a watched socket's peers: True for one that came, False for one that went."""
    found = []
    while int(monitor.getsockopt(zmq.EVENTS)) & zmq.POLLIN:
        found.append(parse_monitor_message(monitor.recv_multipart())["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)
    return found
