"""ZeroMQ's protocol (ZMTP 3.0 without security, over a Unix socket), spoken by hand.

libzmq hands every message to a thread of its own, at either end, so a call and its answer wake six threads one after
the other; by hand it is two. What is spoken is the same: any DEALER of ZeroMQ's may call a `Router`, and a `Dealer` any
ROUTER. Messages have one frame, of MAX_FRAME bytes at most.
"""

import select
import socket
import struct
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

from cairn.errors import CairnError
from cairn.node.bell import Bell
from cairn.node.wire import MAX_FRAME

_GREETING: Final = b"\xff" + bytes(8) + b"\x7f\x03\x00" + b"NULL".ljust(20, b"\0") + bytes(32)
_MORE, _LONG, _COMMAND = 1, 2, 4
#: Read at a time: larger than all but the longest chains' calls.
_READ: Final = 1 << 18
#: What waits for a client that does not take it in, at most; further messages are dropped.
_UNSENT: Final = 2 * MAX_FRAME
#: Connections at a time, and those that wait to be taken.
_CALLERS: Final = 4096
_BACKLOG: Final = 128


class ProtocolError(CairnError):
    """What comes is no ZMTP, or too large."""


def _ready(kind: bytes) -> bytes:
    """What either end says when it has been greeted, and not before. kind: of socket."""
    body = b"\x05READY\x0bSocket-Type" + struct.pack(">I", len(kind)) + kind
    return bytes((_COMMAND, len(body))) + body


def _head(size: int) -> bytes:
    """What stands before a message of so many bytes."""
    return bytes((0, size)) if size < 256 else struct.pack(">BQ", _LONG, size)


class _Messages:
    """Makes messages of what comes from one peer. welcome: called when he has greeted."""

    def __init__(self, welcome: Callable[[], None]) -> None:
        self._welcome = welcome
        self._rest = bytearray()
        self.greeted = self._more = False

    def take(self, came: memoryview) -> Iterator[memoryview]:
        """The messages that are whole now, each until the next is asked for; one of several frames is empty here.
        Raises ProtocolError.
        """
        kept = self._rest
        if kept:
            kept += came
            came = memoryview(kept)
        at = 0
        if not self.greeted and len(came) >= len(_GREETING):
            if came[0] != _GREETING[0] or came[9] != _GREETING[9] or came[10] < 3 or came[12:32] != _GREETING[12:32]:
                raise ProtocolError("no ZMTP 3 without security")
            self.greeted, at = True, len(_GREETING)
            self._welcome()
        while self.greeted and (found := _next(came, at)):
            flags, begin, at = found
            if flags & _COMMAND:
                continue
            if not flags & _MORE:
                yield came[begin:begin] if self._more else came[begin:at]
            self._more = bool(flags & _MORE)
        if at or not kept:
            self._rest = bytearray(came[at:])


def _next(came: memoryview, at: int) -> tuple[int, int, int] | None:
    """(flags, begin, end) of the frame that stands there; None: it is not whole. Raises ProtocolError."""
    if len(came) < at + 2:
        return None
    flags, size, begin = came[at], came[at + 1], at + 2
    if flags & _LONG:
        if len(came) < at + 9:
            return None
        size, begin = int.from_bytes(came[at + 1 : at + 9]), at + 9
    if size > MAX_FRAME:
        raise ProtocolError(f"a frame of {size} bytes, {MAX_FRAME} at most")
    return (flags, begin, begin + size) if begin + size <= len(came) else None


class Dealer:
    """A client's end, for one thread at a time.

    Everything raises OSError where nobody listens, or who did is gone; TimeoutError, which is one, where he takes more
    than `timeout` seconds, and then the connection is of no use any more; ProtocolError.
    """

    def __init__(self, path: Path, timeout: float) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._messages = _Messages(lambda: self._socket.sendall(_ready(b"DEALER")))
        self._came = deque[bytes]()
        self._buffer = memoryview(bytearray(_READ))
        patience = struct.pack("ll", *divmod(max(1, round(timeout * 1e6)), 1_000_000))  # 0 would be for ever
        try:
            for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):  # unlike settimeout no poll before each call
                self._socket.setsockopt(socket.SOL_SOCKET, option, patience)
            self._socket.connect(str(path))
            self._socket.sendall(_GREETING)
            while not self._messages.greeted:
                self._read(wait=True)
        except BaseException:
            self.close()
            raise

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: bytes) -> None:
        head = _head(len(message))
        try:
            sent = self._socket.sendmsg((head, message))
        except BlockingIOError:
            sent = 0
        if sent < len(head) + len(message):
            raise TimeoutError("it takes nothing in")

    def recv(self, *, wait: bool = True) -> bytes:
        """The next message. wait: False: BlockingIOError if there is none yet."""
        while not self._came:
            self._read(wait=wait)
        return self._came.popleft()

    def _read(self, *, wait: bool) -> None:
        try:
            size = self._socket.recv_into(self._buffer, 0, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            if wait:
                raise TimeoutError("it does not answer") from None
            raise
        if not size:
            raise ConnectionResetError("it has hung up")
        self._came.extend(map(bytes, self._messages.take(self._buffer[:size])))

    def close(self) -> None:
        """Idempotent."""
        self._socket.close()


class Caller:
    """One connection at a `Router`."""

    def __init__(self, connection: socket.socket, epoll: select.epoll) -> None:
        """Raises OSError."""
        self._socket, self._epoll = connection, epoll
        self._messages = _Messages(lambda: connection.sendall(_ready(b"ROUTER")))
        self._unsent = bytearray()
        connection.setblocking(False)
        connection.sendall(_GREETING)
        epoll.register(connection, select.EPOLLIN)

    def send(self, message: bytes) -> None:
        """Never waits. To who is gone nothing is said. Who has not taken in what came before, up to a limit, is hung up
        on: he comes again, and would not know of a gap.
        """
        head, sent = _head(len(message)), 0
        if not self._unsent:
            try:
                sent = self._socket.sendmsg((head, message))
            except BlockingIOError:
                pass
            except OSError:
                return  # the router finds out
            if sent == len(head) + len(message):
                return
            self._epoll.modify(self._socket, select.EPOLLIN | select.EPOLLOUT)
        if len(self._unsent) <= _UNSENT:
            self._unsent += (head + message)[sent:]
            return
        with suppress(OSError):  # he is gone already
            self._socket.shutdown(socket.SHUT_RDWR)  # the router finds out, too

    def go_on(self) -> None:
        """Sends what waits, as far as it can be taken. Raises OSError."""
        del self._unsent[: self._socket.send(self._unsent)]
        if not self._unsent:
            self._epoll.modify(self._socket, select.EPOLLIN)

    def take(self, buffer: memoryview) -> Iterator[memoryview]:
        """What he says, see `_Messages`. Raises OSError, ProtocolError."""
        size = self._socket.recv_into(buffer)
        if not size:
            raise ConnectionResetError
        return self._messages.take(buffer[:size])

    def hang_up(self) -> None:
        self._socket.close()


class Router:
    """The node's end, for one thread: whoever connects to `listener`, which is its own from now on."""

    def __init__(self, listener: socket.socket, bell: Bell) -> None:
        self._listener, self._bell = listener, bell
        self._callers: dict[int, Caller] = {}
        self._buffer = memoryview(bytearray(_READ))
        self._epoll = select.epoll()
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        # Told once of who comes: where no descriptor is left for him, the next one is another try.
        self._epoll.register(listener, select.EPOLLIN | select.EPOLLET)
        self._epoll.register(bell, select.EPOLLIN)

    def messages(self, timeout: float) -> Iterator[tuple[Caller, memoryview]]:
        """What has come, of every caller some, each message until the next is asked for; waits for the first one, or
        for the bell, up to `timeout` seconds.
        """
        for fd, events in self._epoll.poll(timeout, len(self._callers) + 2):
            caller = self._callers.get(fd)
            if caller is None:
                self._accept() if fd == self._listener.fileno() else self._bell.heard()
                continue
            try:
                if events & select.EPOLLOUT:
                    caller.go_on()
                if events & ~select.EPOLLOUT:
                    for message in caller.take(self._buffer):
                        yield caller, message
            except BlockingIOError:
                continue
            except (OSError, ProtocolError):
                del self._callers[fd]
                caller.hang_up()

    def close(self) -> None:
        """Hangs up on everybody, who may still read what was sent."""
        for caller in self._callers.values():
            caller.hang_up()
        self._listener.close()
        self._epoll.close()

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return  # nobody waits any more, or nobody can be taken now
            if len(self._callers) < _CALLERS:
                with suppress(OSError):  # gone again
                    self._callers[connection.fileno()] = Caller(connection, self._epoll)
