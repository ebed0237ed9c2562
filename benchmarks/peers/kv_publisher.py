"""Engines that publish KV events as vLLM does, all of one story: for the comparisons in this folder.

    python kv_publisher.py FILE WORKERS FIRST_PORT

FILE holds payloads (`write_story`). Every worker binds a port of its own and waits for a subscription; then, at a line
on the standard input, all publish the payloads as fast as they are taken. Nothing is dropped: what the subscriber does
not take yet waits here, in memory. Needs pyzmq.
"""

import struct
import sys
from pathlib import Path

_LENGTH = struct.Struct("<I")


def write_story(path: Path, payloads: list[bytes]) -> None:
    path.write_bytes(b"".join(_LENGTH.pack(len(payload)) + payload for payload in payloads))


def read_story(path: Path) -> list[bytes]:
    packed, at, payloads = path.read_bytes(), 0, []
    while at < len(packed):
        (size,) = _LENGTH.unpack_from(packed, at)
        payloads.append(packed[at + 4 : at + 4 + size])
        at += 4 + size
    return payloads


def main(path: Path, workers: int, first_port: int) -> None:
    import zmq

    context, payloads = zmq.Context(), read_story(path)
    sockets = []
    for worker in range(workers):
        socket = context.socket(zmq.XPUB)  # a PUB that hears of subscriptions
        socket.set_hwm(0)
        socket.bind(f"tcp://127.0.0.1:{first_port + worker}")
        sockets.append(socket)
    print("bound", flush=True)
    for socket in sockets:
        if not socket.poll(120_000):
            raise SystemExit("nobody subscribes")
        socket.recv()
    print("subscribed", flush=True)
    sys.stdin.readline()
    for sequence, payload in enumerate(payloads):
        for socket in sockets:
            socket.send_multipart([b"", sequence.to_bytes(8, "big"), payload])
    print("sent", flush=True)
    sys.stdin.read()
    context.destroy(linger=0)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
