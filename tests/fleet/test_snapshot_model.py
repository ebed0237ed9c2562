"""Copies of sources, and whole snapshots, against the model: random events before, between and after."""

import copy
import io
import itertools
from typing import Any

import pytest
from hypothesis import settings
from hypothesis.stateful import invariant, run_state_machine_as_test

from cairn.fleet import Event, FleetIndex, Source, copying
from cairn.fleet.copying import SourceCopy
from cairn.fleet.metrics import WarmStarted
from cairn.fleet.snapshot import read_sources, write_sources

from .model import Model
from .test_model import NAMESPACES, Fleet, check


class Kept(Fleet):
    """Copies are begun, and read on block by block, between what is said; now and then all is written and read."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: dict[Source, tuple[SourceCopy, Model, Any, list[Any]]] = {}
        self.turn = 0

    def say(self, source: Source, event: Event) -> None:
        super().say(source, event)
        self.turn += 1
        if self.turn % 5 == 0 and not source.instance.startswith("crowd"):
            self.finish()
            if self.turn % 4 == 0:
                self.restart()
            self.begin()
        elif source in self.copies:
            self.copies[source][3].extend(itertools.islice(self.copies[source][2], 1))

    def begin(self) -> None:
        for source in (Source("a", 0), Source("a", 1), Source("b", 0)):
            made = self.index.copy(source)
            if made is not None:
                assert self.index.cut(source, made)
                self.copies[source] = (made, copy.deepcopy(self.model), made.pieces(), [])

    def finish(self) -> None:
        copies, self.copies = self.copies, {}
        for source, (made, model, pieces, found) in copies.items():
            found += pieces
            made.close()
            if not made.broken:
                self.check_copy(source, made, model, found)

    def restart(self) -> None:
        """All goes to bytes and comes back."""
        buffer = io.BytesIO()
        write_sources(self.index, self.index.sources(), buffer.write)
        buffer.seek(0)
        self.index = FleetIndex(self.capacity)
        assert read_sources(buffer.read, self.index, hold_back=False).outcome is WarmStarted.WARM

    def check_copy(self, source: Source, made: SourceCopy, model: Model, found: list[Any]) -> None:
        other = FleetIndex(self.capacity)
        assert other.restore(source, made.sizes, made.count, held_back=True)
        for piece in found:
            other.fill(source, piece)
        assert other.match([0]).sources == ()
        other.show(source)
        model.held = {source: model.held.get(source, {})}
        model.sizes = {source: model.sizes.get(source, set())}
        self.equal(other, model)

    def equal(self, index: FleetIndex, model: Model) -> None:
        check(index)
        before = self.index, self.model
        self.index, self.model = index, model
        try:
            for tokens in ([0] * 9, [0, 0, 0, 1, 1, 1, 0, 1]):
                for namespace in NAMESPACES[1:]:
                    self.compare(tokens, namespace)
            if self.exact:
                assert index.stats().worker_blocks == sum(map(len, model.held.values()))
        finally:
            self.index, self.model = before

    def finds_what_the_model_finds(self) -> None:
        """Not after each step: the model takes its time."""

    @invariant()
    def only_copies_under_way_are_kept(self) -> None:
        if hasattr(self, "index"):
            assert len(self.index._ledger.copies) == len(self.copies)


class KeptCrowded(Kept):
    """Evictions in between: what is read may lack blocks, and has none that the source did not hold."""

    capacity = 12
    hash_spaces = (1 << 64,)
    exact = False


@pytest.mark.parametrize(("machine", "examples"), [(Kept, 60), (KeptCrowded, 40)])
def test_copies_equal_the_model(machine: type[Fleet], examples: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "PIECE", 2)
    monkeypatch.setattr(copying, "_HOLD", 1)
    run_state_machine_as_test(machine, settings=settings(max_examples=examples, stateful_step_count=40, deadline=None))
