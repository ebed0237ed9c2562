"""An engine that is a node's client, against the same model as an engine that keeps its blocks itself."""

import shutil
import tempfile
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule

from cairn.config import load_config
from cairn.engine import CacheEngine
from cairn.node.pools import directory_of
from tests.engine.pages import GEOMETRY, SLOT, namespace
from tests.engine.test_model import EngineModel

from .rig import ThreadNode, address_in


class ClientEngine(CacheEngine):
    """An engine with a node of its own: both end together. vram: blocks of its segment."""

    def __init__(self, home: Path, dram: int, disk: bool, size: int, vram: int = 0) -> None:
        overrides: dict[str, object] = {"storage.cpu.size": dram * SLOT, "storage.disk.threads": 2}
        if disk:
            overrides |= {"storage.disk.path": str(home), "storage.disk.size": size}
        self.node = ThreadNode(address_in(home), **overrides)
        own = {"storage.vram.size": vram * SLOT, "storage.vram.device": "stand-in"}
        super().__init__(namespace(), load_config(environ={}, overrides=own), node=address_in(home))

    def close(self, timeout: float | None = None) -> None:
        super().close(timeout)
        self.node.close()


class NodeModel(EngineModel):
    @initialize(dram=st.sampled_from([2, 5, 12, 40]), disk=st.booleans(), size=st.sampled_from([160_000, 1 << 20]))
    def start(self, dram: int, disk: bool, size: int) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="cairn-model-"))
        shutil.rmtree(self.directory)
        self.directory = self.home / directory_of(GEOMETRY)
        self.make = lambda: ClientEngine(self.home, dram, disk, size)
        self.persistent = disk
        self.engine = self.make()

    def teardown(self) -> None:
        super().teardown()
        if hasattr(self, "home"):
            shutil.rmtree(self.home)

    @rule()
    def the_session_ends(self) -> None:
        """The client loses its node for a moment; what it had stored is there again."""
        client = self.engine._store._client  # type: ignore[attr-defined]
        link = client.link
        client._found.clear()
        link._lost("the test says so")
        assert client.wait(10)


NodeModel.TestCase.settings = settings(max_examples=10, stateful_step_count=20, deadline=None)
TestNodeModel = NodeModel.TestCase


class VramModel(NodeModel):
    """The same with VRAM before DRAM. That a store went to VRAM is all that is certain of it, so nothing persists."""

    @initialize(dram=st.sampled_from([2, 12, 40]), disk=st.booleans(), vram=st.sampled_from([1, 4, 12, 40]))
    def start(self, dram: int, disk: bool, vram: int) -> None:
        self.home = Path(tempfile.mkdtemp(prefix="cairn-model-"))
        self.make = lambda: ClientEngine(self.home, dram, disk, 1 << 20, vram)
        self.persistent = False
        self.engine = self.make()


VramModel.TestCase.settings = NodeModel.TestCase.settings
TestVramModel = VramModel.TestCase
