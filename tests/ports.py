"""Ports for servers that tests start."""

import contextlib
import random
import socket


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now, and that the system gives to nobody who asks for any."""
    ports: list[int] = []
    chance = random.SystemRandom()  # not what a test, or hypothesis, has seeded: two processes would draw the same
    while len(ports) < count:
        port = chance.randrange(20_000, 32_000)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            ports += [port] if port not in ports else []
    return ports
