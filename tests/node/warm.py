"""Loaded once by the process that the storm's clients are forked from: compiles and loads what they need."""

import tempfile
from pathlib import Path

import numpy as np

from cairn.engine.rehearsal import rehearse
from cairn.index import POLICIES
from cairn.node.gate import Entrance, Gate
from tests.node import storm

for policy in POLICIES.values():
    rehearse(policy)
with tempfile.TemporaryDirectory() as home:
    gate = Gate(Path(home) / "gate")
    entrance = Entrance(gate.path)
    entrance.enter()
    entrance.leave()
    gate.close()
storm.blocks_of(storm.KeyChain(bytes(16), 16, np.zeros(100, np.uint32)))
