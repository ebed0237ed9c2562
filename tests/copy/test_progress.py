"""How a copy that goes layer by layer tells of it: in which groups, and to whom."""

import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from cairn.copy import CpuCopier, PagedKV, Progress
from cairn.kv import KVGeometry


def groups(layers: int, model: Callable[[Progress, int], object]) -> list[list[int]]:
    """model: what the model does while a group is copied, told how many layers are there."""
    found: list[list[int]] = []
    progress = Progress(layers)
    for group in progress.groups():
        assert progress.done == group.start
        found.append(list(group))
        model(progress, group.start)
    assert [layer for group in found for layer in group] == list(range(layers))
    assert progress.done == layers
    return found


def test_before_the_model_begins_each_group_is_as_long_as_all_before_it() -> None:
    assert [len(group) for group in groups(30, lambda *_: None)] == [1, 1, 2, 4, 8, 14]


def test_a_model_that_waits_gets_layer_after_layer() -> None:
    found = groups(12, lambda progress, there: progress.follow(there, 0.0))
    assert [len(group) for group in found] == [1] * 12


def test_a_group_is_no_longer_than_what_the_model_has_before_it() -> None:
    """Here four layers, whenever one begins; more, once that one is there."""

    def model(progress: Progress, there: int) -> None:
        if there > 4:
            progress.follow(there - 4, 0.0)

    assert [len(group) for group in groups(32, model)] == [1, 1, 2, 4, 8, 12, 4]


def test_who_only_waits_for_the_end_is_not_the_model() -> None:
    found = groups(30, lambda progress, _: progress.wait(30, 0.0))
    assert [len(group) for group in found] == [1, 1, 2, 4, 8, 14]


G = KVGeometry(layers=8, kv_heads=2, head_dim=16, dtype="float16", block_tokens=4)
BLOCKS = 64


class Load:
    """A load of `BLOCKS` blocks that a thread of its own makes."""

    def __init__(self, threads: int) -> None:
        rng = np.random.default_rng(0)
        self.memory = rng.integers(0, 256, (BLOCKS, G.block_bytes), dtype=np.uint8)
        self.layers = [np.zeros((2, BLOCKS, 4, 2, 16), np.uint16) for _ in range(G.layers)]
        self.progress = Progress(G.layers)
        self.copier = CpuCopier(G, threads)
        self.copier._half = threads
        self.copier.share_bytes = 1  # type: ignore[misc]
        self.thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        slots, rows = np.arange(4 * BLOCKS, dtype=np.int64), np.arange(BLOCKS, dtype=np.int32)
        kv = PagedKV.from_tensors(self.layers, "nhd", G)
        self.copier.scatter_layers(kv, slots, self.memory, rows, self.progress)

    def there(self, layer: int) -> bool:
        of_layer = self.memory.view(np.uint16).reshape(BLOCKS, *G.block_shape)[:, layer]
        return bool((self.layers[layer] == of_layer.swapaxes(0, 1)).all())


@pytest.mark.parametrize("threads", [1, 3])
def test_a_layer_that_is_said_to_be_there_is(threads: int) -> None:
    for _ in range(20):
        load = Load(threads)
        load.thread.start()
        for layer in range(G.layers):
            assert load.progress.follow(layer, 30.0)
            assert load.there(layer)
        load.thread.join()
        load.copier.close()


@pytest.mark.parametrize("threads", [1, 3])
def test_a_load_that_is_stopped_touches_no_layer_more(threads: int) -> None:
    load = Load(threads)
    load.progress.stop()
    load._run()
    assert load.progress.done == 0
    assert not any(layer.any() for layer in load.layers)
    load.copier.close()


def test_groups_end_when_it_is_stopped() -> None:
    progress = Progress(8)
    found = []
    for group in progress.groups():
        found.append(group)
        if group.start == 1:
            progress.stop()
    assert found == [range(1), range(1, 2)]
    assert progress.done == 2


def test_a_group_that_fails_is_not_there() -> None:
    progress = Progress(8)

    def copy() -> None:
        for group in progress.groups():
            if group.start == 2:
                raise OSError("broken")

    with pytest.raises(OSError, match="broken"):
        copy()
    assert progress.done == 2


def test_who_follows_waits_no_longer_than_he_said_nor_than_it_goes_on() -> None:
    progress = Progress(2)
    started = time.monotonic()
    assert not progress.follow(0, 0.05)
    assert 0.05 <= time.monotonic() - started < 5
    threading.Timer(0.05, progress.stop).start()
    assert not progress.wait(2)
    assert progress.stopped


def test_what_is_there_is_not_waited_for_even_when_it_was_stopped() -> None:
    progress = Progress(3)
    groups = progress.groups()
    next(groups)
    next(groups)
    progress.stop()
    assert progress.follow(0)
    assert not progress.follow(1)
