"""The bell: how other threads wake the node's loop."""

import threading
from contextlib import suppress
from typing import Final

import zmq

_ENDPOINT: Final = "inproc://bell"


class Bell:
    """Wakes whoever waits in `recv` of a ROUTER, by a message of its own, so that the loop needs no poller: that would
    be looked at twice for every call.

    Its messages come from NAME, which no client can have. Thread-safe but for `heard`, which is the loop's.
    """

    NAME: Final = b"bell"

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", router: "zmq.Socket[bytes]") -> None:
        self._lock = threading.Lock()
        self._rung = False
        router.bind(_ENDPOINT)
        self._socket: zmq.Socket[bytes] = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.ROUTING_ID, self.NAME)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(_ENDPOINT)

    def ring(self, *, wait: bool = True) -> None:
        """What the caller has done before is seen by the loop after its next `heard`.

        wait: False in a signal's handler, which may have interrupted the one who rings right now.
        """
        if not self._lock.acquire(blocking=wait):
            return
        try:
            if not self._rung and not self._socket.closed:
                self._rung = True
                with suppress(zmq.Again):  # the loop has ended
                    self._socket.send(b"", zmq.NOBLOCK)
        finally:
            self._lock.release()

    def heard(self) -> None:
        """The loop has had the message, and looks now at what there is."""
        self._rung = False

    def close(self) -> None:
        """From now on ringing does nothing. Idempotent."""
        with self._lock:
            self._socket.close()
