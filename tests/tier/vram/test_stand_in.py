"""Memory in the place of VRAM: mapped by others as long as its owner lives, and gone with its last user."""

import subprocess
import sys

import numpy as np
import pytest

from cairn.errors import ConfigError, StorageError
from cairn.tier.vram import open_device
from cairn.tier.vram.stand_in import StandIn

_OWNER = """
import sys
from cairn.tier.vram.stand_in import StandIn
segment = StandIn().take(3, 4096)
segment.memory[:] = 7
print(segment.handle.decode(), flush=True)
sys.stdin.read()
"""


def test_a_segment_of_another_process() -> None:
    owner = subprocess.Popen([sys.executable, "-c", _OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert owner.stdout
    handle = owner.stdout.readline().strip()
    with pytest.raises(StorageError, match="another by now"):
        StandIn().map(handle, 4, 4096)
    segment = StandIn().map(handle, 3, 4096)
    owner.kill()
    owner.communicate()
    assert isinstance(segment.memory, np.ndarray)
    assert (segment.memory == 7).all(), "what is mapped stays until it is unmapped"
    segment.close()
    segment.close()
    with pytest.raises(StorageError, match="cannot be mapped"):
        StandIn().map(handle, 3, 4096)


@pytest.mark.parametrize("handle", [b"", b"1 2", b"x y z", b"\xff", b"1 2 3 4"])
def test_handles_that_are_none(handle: bytes) -> None:
    with pytest.raises(StorageError, match="handle"):
        StandIn().map(handle, 1, 4096)


def test_a_descriptor_of_something_else_is_not_mapped() -> None:
    segment = StandIn().take(1, 4096)
    pid, number, name = segment.handle.decode().split()
    with pytest.raises(StorageError, match="another by now"):
        StandIn().map(f"{pid} {number} {name}x".encode(), 1, 4096)
    segment.close()


def test_more_than_there_is() -> None:
    with pytest.raises(StorageError, match=r"storage\.vram\.size"):
        StandIn().take(1 << 26, 1 << 30)


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", ""])
def test_names_that_are_no_device(name: str) -> None:
    with pytest.raises(ConfigError, match="must be cuda, cuda:N, or stand-in"):
        open_device(name)
