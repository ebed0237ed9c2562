"""Answers other hosts' nodes: what this one's DRAM holds, and leases on its rows."""

import logging
import threading
import time
from typing import Final

import zmq
from zmq.auth.thread import ThreadAuthenticator

from cairn.errors import StorageError
from cairn.node.lending import Lending
from cairn.node.wire import keys_of
from cairn.observe.log import log_once
from cairn.tier.peer.wire import MAX_FRAME, Find, Found, GiveBack, Keypair, Lend, Reply, decode_request, encode

log = logging.getLogger(__name__)

_WORKERS: Final = 2
#: How often leases are looked at, milliseconds.
_TICK_MS: Final = 500
_HEARTBEAT_MS: Final = 5_000
_INNER: Final = "inproc://peers"
_CLOSE_S: Final = 5.0


class PeerService:
    """Answers peers at `address`, those who know the secret, by threads of its own."""

    def __init__(self, address: str, keypair: Keypair, lending: Lending) -> None:
        """Raises StorageError where the address cannot be had."""
        self.lending = lending
        self._context = zmq.Context()
        self._guard = ThreadAuthenticator(self._context)
        self._guard.start()
        self._guard.configure_curve_callback(credentials_provider=_Only(keypair.public))
        front: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        back: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        keypair.guard(front, server=True)
        front.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
        front.setsockopt(zmq.HEARTBEAT_IVL, _HEARTBEAT_MS)
        front.setsockopt(zmq.LINGER, 0)
        try:
            front.bind(address)
        except zmq.ZMQError as error:
            self._guard.stop()
            self._context.destroy(linger=0)
            raise StorageError(f"node.peers.address={address}: cannot be bound: {error.strerror}") from None
        self.address = front.getsockopt_string(zmq.LAST_ENDPOINT)
        back.bind(_INNER)
        targets = [lambda: _carry(front, back), *[self._work] * _WORKERS]
        self._threads = [threading.Thread(target=target, name="cairn-node-peers", daemon=True) for target in targets]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        self._guard.stop()
        self._context.term()
        for thread in self._threads:
            thread.join(_CLOSE_S)
        self.lending.close()

    def _work(self) -> None:
        socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        socket.setsockopt(zmq.RCVTIMEO, _TICK_MS)
        socket.setsockopt(zmq.LINGER, 0)
        socket.connect(_INNER)
        tidied = 0.0
        try:
            while True:
                try:
                    frames = socket.recv_multipart()
                    reply = self._answer(frames[-1])
                    if reply is not None:
                        socket.send_multipart([frames[0], encode(reply)])
                except zmq.Again:
                    pass
                if time.monotonic() - tidied > _TICK_MS / 1000:
                    self.lending.tidy()
                    tidied = time.monotonic()
        except zmq.ContextTerminated:
            socket.close(0)

    def _answer(self, frame: bytes) -> Reply | None:
        """None: nothing is to be answered."""
        try:
            request = decode_request(frame)
            if isinstance(request, Find):
                return Found(self.lending.find(request.pool, keys_of(request.keys)))
            if isinstance(request, Lend):
                return self.lending.lend(request.pool, keys_of(request.keys), request.seconds)
            if isinstance(request, GiveBack):
                self.lending.give_back(request.lease)
            else:
                log_once(log, "malformed", "a peer's frame was not understood; run the same release of Cairn there")
            return None
        except Exception as error:  # noqa: BLE001 - a bug costs one call, which is the peer's counted timeout: logged
            log_once(log, f"call {type(error).__name__}", f"a peer's call failed: {error!r}")
            return None


class _Only:
    """CURVE's question whose key is let in: those alone who share the secret have this one."""

    def __init__(self, public: bytes) -> None:
        self._public = public

    def callback(self, domain: str, key: bytes) -> bool:  # noqa: ARG002 - the contract
        return key == self._public


def _carry(front: "zmq.Socket[bytes]", back: "zmq.Socket[bytes]") -> None:
    """Carries frames between peers and the threads that answer them, until the context ends."""
    try:
        zmq.proxy(front, back)
    except zmq.ContextTerminated:
        front.close(0)
        back.close(0)
