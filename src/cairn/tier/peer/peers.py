"""The other nodes that are known now, and how they are asked."""

import threading
import time
from collections.abc import Iterable
from typing import Final

import zmq

from cairn.observe.reasons import Reason
from cairn.tier.breaker import Breaker
from cairn.tier.peer.wire import MAX_FRAME, Keypair, Reply, Request, decode_reply, encode

Socket = zmq.Socket[bytes]

#: An answer that took less than this is not late by the node's fault.
FAIR_S: Final = 0.02
#: A node that is away is tried at least so often: that costs a lookup its deadline.
_LONGEST_REST_S: Final = 10.0


class Peer:
    """Another node. answers, reads: breakers, open while it does not answer, or cannot be read from."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.answers = Breaker(longest_seconds=_LONGEST_REST_S)
        self.reads = Breaker(longest_seconds=_LONGEST_REST_S)
        self.idle: list[Socket] = []

    @property
    def ready(self) -> bool:
        return self.answers.ready() and self.reads.ready()


class Peers:
    """Asks nodes, each over as many connections as there are calls at a time. Thread-safe.

    A connection serves one call after the other, and one that has not answered in time, or says something unasked, is
    closed, so that no late answer is taken for another's.
    """

    def __init__(self, keypair: Keypair) -> None:
        self._keypair = keypair
        self._context = zmq.Context()
        self._peers: dict[str, Peer] = {}
        self._lock = threading.Lock()

    def replace(self, addresses: Iterable[str]) -> None:
        """These are the other nodes from now on; of those known already it is remembered how they did."""
        with self._lock:
            before, wanted = self._peers, dict.fromkeys(addresses)
            self._peers = {address: before.get(address) or Peer(address) for address in wanted}
        for address in before.keys() - wanted:
            _close(before[address].idle)

    def all(self) -> list[Peer]:
        return list(self._peers.values())

    def has(self, peer: Peer) -> bool:
        return self._peers.get(peer.address) is peer

    def ask(self, peers: Iterable[Peer], request: Request, deadline: float) -> dict[Peer, Reply | None]:
        """Asks all at once; what each answers by `deadline` (monotonic), None: nothing. Leaves out those at rest."""
        frame, begun, poller = encode(request), time.monotonic(), zmq.Poller()
        waiting: dict[Socket, Peer] = {}
        answers: dict[Peer, Reply | None] = {}
        for peer in peers:
            if not peer.answers.allow():
                continue
            socket = self._send(peer, frame)
            if socket is None:
                peer.answers.failure()
                answers[peer] = None
                continue
            waiting[socket] = peer
            poller.register(socket, zmq.POLLIN)
        while waiting and (left := deadline - time.monotonic()) > 0:
            for socket, _ in poller.poll(max(1, int(1000 * left))):
                peer = waiting.pop(socket)
                poller.unregister(socket)
                answers[peer] = decode_reply(socket.recv())
                if answers[peer] is None:
                    peer.answers.failure()
                    socket.close(0)
                else:
                    peer.answers.success()
                    self._keep(peer, socket)
        for socket, peer in waiting.items():
            if deadline - begun > FAIR_S:
                peer.answers.failure()
            socket.close(0)
            answers[peer] = None
        return answers

    def call(self, peer: Peer, request: Request, deadline: float) -> Reply | Reason:
        """Asks one; what it answers, or why there is nothing."""
        answers = self.ask([peer], request, deadline)
        return answers[peer] or Reason.TIMEOUT if answers else Reason.BREAKER_OPEN

    def tell(self, peer: Peer, request: Request) -> None:
        """Tells one what is not answered."""
        socket = self._send(peer, encode(request))
        if socket is not None:
            self._keep(peer, socket)

    def close(self) -> None:
        """Ends all connections; no call is under way. Idempotent."""
        self._context.destroy(linger=100)

    def _send(self, peer: Peer, frame: bytes) -> Socket | None:
        """The connection on which it was sent; None: it could not be, by what the peer has registered as its address,
        by what it has not taken in, or for want of sockets.
        """
        socket = self._quiet(peer) or self._connected(peer)
        if socket is None:
            return None
        try:
            socket.send(frame, zmq.DONTWAIT)
        except zmq.ZMQError:
            socket.close(0)
            return None
        return socket

    def _quiet(self, peer: Peer) -> Socket | None:
        """An idle connection on which nothing has come since it was used."""
        while True:
            try:
                socket = peer.idle.pop()
            except IndexError:
                return None
            if not socket.poll(0):
                return socket
            socket.close(0)

    def _connected(self, peer: Peer) -> Socket | None:
        try:
            socket = self._context.socket(zmq.DEALER)
        except zmq.ZMQError:
            return None
        try:
            self._keypair.guard(socket, server=False)
            socket.setsockopt(zmq.MAXMSGSIZE, MAX_FRAME)
            socket.connect(peer.address)
        except zmq.ZMQError:
            socket.close(0)
            return None
        return socket

    def _keep(self, peer: Peer, socket: Socket) -> None:
        if self.has(peer):
            peer.idle.append(socket)
        else:
            socket.close(0)


def _close(sockets: list[Socket]) -> None:
    while sockets:
        sockets.pop().close(0)
