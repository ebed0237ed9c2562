"""Whether a node answers: for probes and health checks, which run as its user."""

import zmq

from cairn.errors import StorageError
from cairn.node import wire
from cairn.node.address import socket_path


def ping(address: str, timeout: float) -> None:
    """Asks the node's loop something that costs it nothing, in a session that does not exist.

    Raises StorageError, in one line, unless it answers within `timeout` seconds, and InputError for what is no address.
    """
    path = socket_path(address)
    if not path.exists():
        raise StorageError(f"node at {address}: does not run")
    context = zmq.Context()
    socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    try:
        socket.setsockopt(zmq.RCVTIMEO, int(timeout * 1000))
        socket.connect(address)
        socket.send(wire.encode(wire.Stats(1, 0)))
        wire.decode_reply(socket.recv())
    except zmq.Again:
        raise StorageError(f"node at {address}: has not answered within {timeout:g} s; is it stopped?") from None
    except wire.WireError as error:
        raise StorageError(f"node at {address}: {error}") from None
    finally:
        context.destroy(linger=0)
