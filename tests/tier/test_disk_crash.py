"""kill -9 at 200 random moments: what was acknowledged is found, and nothing wrong is ever served."""

import os
import random
import signal
import struct
import time
from pathlib import Path

import pytest

from cairn.index import LRU
from cairn.tier.disk import DiskTier
from tests.tier.rig import get, opened, prompt, put

KILLS = 200
SLOTS = 240
BLOCKS = 5  # a prompt
REPORT = struct.Struct("<II")  # prompt, its leading blocks that are acknowledged


def write_until_killed(path: Path, first_prompt: int, pipe: int) -> None:
    """The child: writes prompt after prompt in two pieces, and reports each piece after its future is done."""
    with opened(path, slots=SLOTS, threads=3, policy=LRU) as tier:
        number = first_prompt
        while True:
            keys = prompt(number, BLOCKS)
            for blocks in (2, BLOCKS):
                if put(tier, keys[:blocks]) == [None] * blocks:
                    os.write(pipe, REPORT.pack(number, blocks))
            if number % 8 == 0:
                tier.sync(10)
            number += 1


def run_and_kill(path: Path, first_prompt: int, chooser: random.Random) -> dict[int, int]:
    """Starts a writer and kills it at a random moment; returns what it had acknowledged: blocks by prompt."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reader)
            write_until_killed(path, first_prompt, writer)
        finally:
            os._exit(3)
    os.close(writer)
    received = b""
    # Half of the time while the directory is being opened, else after some reports; then some moment later.
    wanted = chooser.choice([0, chooser.randrange(1, 60)]) * REPORT.size
    while len(received) < wanted:
        part = os.read(reader, wanted - len(received))
        assert part, "the writer ended by itself"
        received += part
    until = time.perf_counter() + chooser.random() * (0.012 if wanted == 0 else 0.002)
    while time.perf_counter() < until:
        pass
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    while part := os.read(reader, 1 << 16):
        received += part
    os.close(reader)
    return dict(REPORT.iter_unpack(received))


def prove_all(tier: DiskTier, numbers: range) -> int:
    """Reads everything that these prompts have in the directory; all of it must be right. Returns how many blocks."""
    proved = 0
    for number in numbers:
        keys = prompt(number, BLOCKS)
        keys = keys[: tier.match(keys)]
        assert set(get(tier, keys)) <= {None}, f"a block of prompt {number} was found and could not be proved"
        proved += len(keys)
    return proved


@pytest.mark.slow
def test_kill_9_at_200_random_moments(tmp_path: Path) -> None:
    chooser = random.Random(1)
    next_prompt, acknowledged, proved = 0, 0, 0
    for kill in range(KILLS):
        # Every fourth time a new directory, so that kills also hit its making.
        path = tmp_path / (f"new-{kill}" if kill % 4 == 0 else "old")
        found = run_and_kill(path, next_prompt, chooser)
        last = max(found, default=next_prompt) + 2
        with opened(path, slots=SLOTS, threads=BLOCKS, policy=LRU) as tier:
            assert tier.stats()["damaged_records"] == 0
            # On a busy machine a life may outlast its kill by more prompts than there is room for: the oldest went.
            for number in sorted(found)[-(SLOTS // BLOCKS - 2) :]:
                blocks = found[number]
                held = tier.match(prompt(number, BLOCKS))
                assert held >= blocks, f"kill {kill}: acknowledged blocks of prompt {number} are gone"
            # Of this life and of those before.
            proved += prove_all(tier, range(max(0, last - 2 * SLOTS // BLOCKS), last))
            assert tier.stats()["resident_blocks"] == tier.stats()["restored_blocks"]
        acknowledged += sum(found.values())
        next_prompt = last
    assert acknowledged > KILLS * BLOCKS
    assert proved > 100 * KILLS
