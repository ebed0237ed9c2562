"""One connection that speaks RESP2, the protocol of Redis and Valkey, without copying values.

Values go out by `sendmsg` from where they lie and come in by `recv_into` to where they shall be. The known clients make
bytes of every value first, which halves the throughput at the sizes used here (`cairn bench remote`).
Protocol: https://valkey.io/topics/protocol/
"""

import socket
import ssl
import time
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

_LINE_LIMIT: Final = 1 << 16
_VECTORS: Final = 512
#: A value longer than asked for is read away up to this size, the largest that servers hold; beyond it the connection
#: is dropped instead.
_DRAIN_LIMIT: Final = 512 << 20
#: Of a number: no sound one has more.
_DIGITS: Final = 19

#: A word of a command: bytes, or the parts that it consists of.
Word = bytes | Sequence[memoryview]
Command = Sequence[Word]


class Target(NamedTuple):
    """Where one reply's value shall go: `parts`, filled one after the other."""

    parts: Sequence[memoryview]


class ErrorReply(Exception):  # noqa: N818 - a reply, not a failure of ours
    """The server answered a command with an error; the connection is sound. The message begins with its code."""


class ProtocolError(OSError):
    """The peer does not speak RESP2; the connection is of no use any more."""


Reply = int | bytes | list["Reply"] | None | ErrorReply


class Connection:
    """A socket and what has been received too much. Not thread-safe.

    Every call takes a `deadline` (time.monotonic) and raises OSError (TimeoutError among them) when it was not met or
    the peer is gone; then the connection must be closed, since nobody knows any more which reply comes next.
    """

    def __init__(self, address: tuple[str, int], *, tls: ssl.SSLContext | None, deadline: float) -> None:
        self._socket = _connected(address, deadline)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if tls is not None:
                self._socket.settimeout(_left(deadline))
                self._socket = tls.wrap_socket(self._socket, server_hostname=address[0])
        except OSError:
            self._socket.close()
            raise
        self._tls = tls is not None
        self._buffer = memoryview(bytearray(4096))
        self._start = self._stop = 0

    def close(self) -> None:
        self._socket.close()

    def call(self, command: Command, *, deadline: float) -> Reply:
        """One command and its reply."""
        self.send([command], deadline=deadline)
        return self.reply(deadline=deadline)

    def send(self, commands: Sequence[Command], *, deadline: float) -> None:
        """Sends commands, whose replies come in the same order."""
        parts: list[bytes | memoryview] = []
        for command in commands:
            parts += _encoded(command)
        self._send(_joined(parts), deadline)

    def reply(self, *, deadline: float) -> Reply:
        """The next reply. An error reply is returned, not raised."""
        return self._read(deadline, None)

    def reply_into(self, target: Target, *, deadline: float) -> int | ErrorReply | None:
        """The next reply, a value, put into `target`; returns its length, None for nil.

        Of a value longer than the target only the first bytes are kept, but its own length is returned.
        """
        reply = self._read(deadline, target)
        assert reply is None or isinstance(reply, int | ErrorReply)
        return reply

    # --- parts ---------------------------------------------------------------------------------------------------

    def _read(self, deadline: float, target: Target | None, depth: int = 0) -> Reply:
        line = self._line(deadline)
        kind, rest = line[:1], line[1:]
        if kind == b"+" and target is None:
            return rest
        if kind == b"-":
            return ErrorReply(rest.decode(errors="replace"))
        digits = rest.removeprefix(b"-")
        if kind not in (b":", b"$", b"*") or not digits.isdigit() or len(digits) > _DIGITS:
            raise ProtocolError(f"a reply that begins with {line[:16]!r}")
        number = int(rest)
        if kind != b"$" and target is not None:
            raise ProtocolError("a reply that is no value")
        if kind == b":":
            return number
        if number < 0:
            return None
        if kind == b"$":
            return self._value(number, deadline) if target is None else self._value_into(number, target, deadline)
        if number > _LINE_LIMIT or depth > 4:
            raise ProtocolError(f"an array of {number}, {depth} deep")
        return [self._read(deadline, None, depth + 1) for _ in range(number)]

    def _value(self, length: int, deadline: float) -> bytes:
        if length > _LINE_LIMIT:
            raise ProtocolError(f"a value of {length} bytes where a short one was expected")
        value = bytearray(length + 2)
        self._fill(memoryview(value), deadline)
        return bytes(value[:length])

    def _value_into(self, length: int, target: Target, deadline: float) -> int:
        left = length
        views = []
        for part in target.parts:
            if left and len(part):
                views.append(part[:left])
                left -= len(views[-1])
        self._scatter(views, deadline)
        if left > _DRAIN_LIMIT:
            raise ProtocolError(f"a value of {length} bytes where {length - left} were expected")
        waste = memoryview(bytearray(min(left + 2, 1 << 20)))
        left += 2  # the line's end
        while left:
            piece = waste[: min(left, len(waste))]
            self._fill(piece, deadline)
            left -= len(piece)
        return length

    def _scatter(self, views: list[memoryview], deadline: float) -> None:
        """Fills all views, first from what has been received already."""
        at = 0
        while at < len(views):
            if self._start < self._stop or self._tls:
                self._fill(views[at], deadline)
                at += 1
                continue
            self._socket.settimeout(_left(deadline))
            got = self._socket.recvmsg_into(views[at : at + _VECTORS])[0]
            if not got:
                raise ConnectionResetError("the server closed the connection")
            while at < len(views) and got >= len(views[at]):
                got -= len(views[at])
                at += 1
            if got:
                views[at] = views[at][got:]

    def _fill(self, view: memoryview, deadline: float) -> None:
        ready = min(self._stop - self._start, len(view))
        view[:ready] = self._buffer[self._start : self._start + ready]
        self._start += ready
        while ready < len(view):
            self._socket.settimeout(_left(deadline))
            got = self._socket.recv_into(view[ready:])
            if not got:
                raise ConnectionResetError("the server closed the connection")
            ready += got

    def _line(self, deadline: float) -> bytes:
        """The next line, without its end."""
        line = b""
        while True:
            held = bytes(self._buffer[self._start : self._stop])
            line += held
            end = line.find(b"\r\n")
            if end >= 0:
                self._start = self._stop - (len(line) - end - 2)
                return line[:end]
            if len(line) > _LINE_LIMIT:
                raise ProtocolError("a line without an end")
            self._socket.settimeout(_left(deadline))
            got = self._socket.recv_into(self._buffer)
            if not got:
                raise ConnectionResetError("the server closed the connection")
            self._start, self._stop = 0, got

    def _send(self, parts: list[memoryview], deadline: float) -> None:
        while parts:
            self._socket.settimeout(_left(deadline))
            if self._tls:
                self._socket.sendall(parts.pop(0))
                continue
            sent = self._socket.sendmsg(parts[:_VECTORS])
            done = 0
            while done < len(parts) and sent >= len(parts[done]):
                sent -= len(parts[done])
                done += 1
            del parts[:done]
            if sent:
                parts[0] = parts[0][sent:]


def _connected(address: tuple[str, int], deadline: float) -> socket.socket:
    """A connection to the first that answers of the addresses that a name has; each gets its share of the time, where
    `socket.create_connection` gives all of it to each. Raises OSError.
    """
    try:
        found = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise OSError(f"{address[0]!r} is no name of a host") from None
    failure: OSError = OSError(f"{address[0]!r} has no address")
    for i, (family, kind, protocol, _, place) in enumerate(found):
        share = _left(deadline) / (len(found) - i)
        try:
            return _dialled(socket.socket(family, kind, protocol), place, share)
        except OSError as error:
            failure = error
    raise failure


def _dialled(one: socket.socket, place: Any, seconds: float) -> socket.socket:
    try:
        one.settimeout(seconds)
        one.connect(place)
    except OSError:
        one.close()
        raise
    return one


def _encoded(command: Command) -> list[bytes | memoryview]:
    parts: list[bytes | memoryview] = [b"*%d\r\n" % len(command)]
    for word in command:
        pieces = [word] if isinstance(word, bytes) else word
        parts += (b"$%d\r\n" % sum(len(piece) for piece in pieces), *pieces, b"\r\n")
    return parts


def _joined(parts: list[bytes | memoryview]) -> list[memoryview]:
    """The same bytes with short neighbours made one, so that long ones go out as they lie."""
    joined: list[memoryview] = []
    short = bytearray()
    for part in parts:
        if len(part) < 1024:
            short += part
            continue
        joined += (memoryview(bytes(short)), memoryview(part))
        short.clear()
    joined.append(memoryview(bytes(short)))
    return [part for part in joined if len(part)]


def _left(deadline: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("the deadline has passed")
    return left
