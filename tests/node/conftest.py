"""Nodes in processes of their own die with the test that started them, also when it fails."""

from collections.abc import Iterator

import pytest

from cairn.node.segments import sweep

from .rig import ProcessNode


@pytest.fixture(autouse=True)
def _no_node_is_left() -> Iterator[None]:
    yield
    if ProcessNode.started:
        for node in ProcessNode.started:
            node.kill()
        ProcessNode.started.clear()
        sweep()
