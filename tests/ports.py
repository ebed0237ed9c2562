"""Ports for tests that must name one before anybody listens there."""

import contextlib
import os
import random
import socket

#: Which of pytest-xdist's processes this is, and of how many: each draws ports of its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))

_given: set[int] = set()


def free_ports(count: int) -> list[int]:
    """Ports that nobody has now, that nobody was given before, and that the system gives to nobody who asks for any."""
    ports: list[int] = []
    chance = random.SystemRandom()  # not what a test, or hypothesis, has seeded: two processes would draw the same
    while len(ports) < count:
        port = chance.randrange(20_000 + _WORKER, 32_000, _WORKERS)
        with contextlib.suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            if port not in _given:
                _given.add(port)
                ports.append(port)
    return ports
