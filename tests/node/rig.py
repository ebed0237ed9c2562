"""Nodes to test with: in a thread of this process, or in a process of their own that can be killed."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

from cairn.config import load_config
from cairn.engine.pool import open_pool
from cairn.node.segments import HOME
from cairn.node.server import Node

TIMEOUT_S = 30


class ThreadNode:
    """A node in a thread. Its arena is shared memory all the same."""

    def __init__(self, address: str, **settings: Any) -> None:
        self.node = Node(load_config(environ={}, overrides=settings), address, open_pool)
        self._thread = threading.Thread(target=self.node.run)
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        self.node.stop()
        self._thread.join(TIMEOUT_S)
        assert not self._thread.is_alive()
        self.node.close(timeout)


@contextmanager
def thread_node(address: str, **settings: Any) -> Iterator[ThreadNode]:
    node = ThreadNode(address, **settings)
    try:
        yield node
    finally:
        node.close()


def heard_until_it_listens(process: subprocess.Popen[str]) -> str:
    """What a node has logged until then: that it has swept what dead ones have left, for one; or until it ended."""
    assert process.stderr
    said = line = process.stderr.readline()
    while line and "listening at" not in line:
        said += (line := process.stderr.readline())
    return said


class ProcessNode:
    """`cairn node --foreground` in a process of its own; here once it listens."""

    started: ClassVar[list["ProcessNode"]] = []

    def __init__(self, address: str, **settings: Any) -> None:
        command = [sys.executable, "-c", "from cairn.cli import main; main()", "node", "--address", address]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        self.process = subprocess.Popen([*command, "--foreground"], stderr=subprocess.PIPE, text=True)
        self.started.append(self)
        self.said = heard_until_it_listens(self.process)
        # Nobody reads on: what is logged once fits the pipe.

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def stop(self) -> str:
        """Ends it in order; what it has logged."""
        self.process.terminate()
        _, logged = self.process.communicate(timeout=TIMEOUT_S)
        assert self.process.returncode == 0, logged
        return self.said + logged


def address_in(home: Path) -> str:
    return f"ipc://{home}/node.sock"


def segments() -> set[str]:
    """Nodes' segments that there are now."""
    return {path.name for path in HOME.glob("cairn-node-*")}
