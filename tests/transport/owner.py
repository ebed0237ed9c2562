"""A process whose memory others read: serves two parts of a segment, the second one when it is told to.

python -m tests.transport.owner NAME BYTES; lines on stdin: serve, withdraw.
"""

import sys

import numpy as np

from cairn.tier.arena import Arena
from cairn.transport.mooncake import MooncakeTransport


def say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    name, size = sys.argv[1], int(sys.argv[2])
    arena = Arena.shared(name, 2, size)
    arena.memory[:] = np.random.default_rng(0).integers(0, 256, arena.memory.shape, np.uint8)
    transport = MooncakeTransport("127.0.0.1")
    first, second = Arena.attach(name, 2, size, writable=not transport.guarded).memory
    transport.serve(first)
    say(f"{transport.endpoint} {first.ctypes.data}")
    for line in sys.stdin:
        {"serve": transport.serve, "withdraw": transport.withdraw}[line.strip()](second)
        say("done")
