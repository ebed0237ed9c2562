"""`cairn node --check`, which probes run."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.errors import InputError, StorageError
from cairn.node.ping import ping

from .rig import TIMEOUT_S, ProcessNode, address_in


def test_a_node_answers_until_it_is_stopped_or_gone(tmp_path: Path) -> None:
    address = address_in(tmp_path)
    with pytest.raises(StorageError, match="does not run"):
        ping(address, TIMEOUT_S)
    node = ProcessNode(address)
    ping(address, TIMEOUT_S)
    command = [sys.executable, "-c", "from cairn.cli import main; main()", "node", "--address", address, "--check"]
    said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT_S).stdout
    assert said == f"node at {address}: answers\n"
    node.process.send_signal(signal.SIGSTOP)
    with pytest.raises(StorageError, match=r"has not answered within 0\.2 s"):
        ping(address, 0.2)
    node.process.send_signal(signal.SIGCONT)
    ping(address, TIMEOUT_S)
    node.kill()  # its socket stays
    assert (tmp_path / "node.sock").exists()
    with pytest.raises(StorageError, match="does not run"):
        ping(address, 0.2)
    with pytest.raises(InputError, match="node's address is ipc://"):
        ping("tcp://127.0.0.1:1", 1.0)
