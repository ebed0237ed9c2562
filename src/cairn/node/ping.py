"""Whether a node answers: for probes and health checks, which run as its user."""

from cairn.errors import StorageError
from cairn.node import wire
from cairn.node.address import socket_path
from cairn.node.zmtp import Dealer, ProtocolError


def ping(address: str, timeout: float) -> None:
    """Asks the node's loop something that costs it nothing, in a session that does not exist.

    Raises StorageError, in one line, unless it answers within `timeout` seconds, and InputError for what is no address.
    """
    try:
        dealer = Dealer(socket_path(address), timeout)
        try:
            dealer.send(wire.encode(wire.Stats(1, 0)))
            wire.decode_reply(dealer.recv())
        finally:
            dealer.close()
    except (FileNotFoundError, ConnectionRefusedError):
        raise StorageError(f"node at {address}: does not run") from None
    except TimeoutError:
        raise StorageError(f"node at {address}: has not answered within {timeout:g} s; is it stopped?") from None
    except (wire.WireError, ProtocolError, OSError) as error:
        raise StorageError(f"node at {address}: {error}") from None
