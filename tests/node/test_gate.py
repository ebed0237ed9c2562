"""The gate: nobody inside of a closed one, whoever was inside is waited for, and the dead are not."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cairn.node.gate import Entrance, Gate, Passage

_INSIDE = "from tests.node.test_gate import stay; stay({path!r}, {enter})"


def stay(path: str, enter: bool) -> None:
    """Opens a gate, goes in if asked to, and stays until it is told to leave."""
    entrance = Entrance(Path(path))
    if enter:
        assert entrance.enter()
    for line in sys.stdin:
        if line == "leave\n":
            entrance.leave()
        sys.stdout.write("ready\n")
        sys.stdout.flush()


class Guest:
    def __init__(self, path: Path, enter: bool) -> None:
        code = _INSIDE.format(path=str(path), enter=enter)
        pipe = subprocess.PIPE
        self.process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
        self.tell("ready")

    def tell(self, word: str) -> None:
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        assert self.process.stdout.readline() == "ready\n"


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


@pytest.fixture
def guest(gate: Gate) -> "Callable[[bool], Guest]":
    guests: list[Guest] = []

    def make(enter: bool) -> Guest:
        guests.append(Guest(gate.path, enter))
        return guests[-1]

    yield make  # type: ignore[misc]
    for one in guests:
        one.process.kill()
        one.process.communicate()


def test_a_closed_gate_lets_nobody_in(gate: Gate) -> None:
    entrance, memory = Entrance(gate.path), np.zeros((1, 1), np.uint8)
    with Passage(entrance, memory) as inside:
        assert inside is memory
        assert not gate.close(), "somebody is inside"
        with Passage(entrance, memory) as second:
            assert second is None
    assert gate.close()
    assert not entrance.enter()
    assert gate.close(), "who stayed out must not count"


def test_who_is_inside_is_waited_for(gate: Gate, guest: Callable[[bool], Guest]) -> None:
    one = guest(True)
    assert not gate.close()
    os.kill(one.process.pid, signal.SIGSTOP)
    assert not gate.close(), "a stopped process may go on in its rows"
    os.kill(one.process.pid, signal.SIGCONT)
    one.tell("leave")
    assert gate.close()


def test_the_dead_are_not_waited_for(gate: Gate, guest: Callable[[bool], Guest]) -> None:
    one, other = guest(True), guest(False)
    one.process.kill()
    one.process.wait()
    assert not gate.close(), "while another process of the session lives"
    other.process.kill()
    other.process.wait()
    assert not gate.attended()
    assert gate.close()


def test_no_gate(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Entrance(tmp_path / "none")
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(OSError, match="no gate"):
        Entrance(tmp_path / "other")
