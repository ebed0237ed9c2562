"""In which groups a load's layers are copied: many where the model is far behind, one by one where it waits."""

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any

from cairn.engine import LayerLoad


class Later(Executor):
    """Runs what it is given when the test says so."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> "Future[Any]":
        self.job = fn
        return Future()


def groups(layers: int, model: Callable[[LayerLoad, int], None]) -> list[list[int]]:
    """model: what the model does while a group is copied, told how many layers are there."""
    found: list[list[int]] = []

    def copy(group: range) -> bool:
        found.append(list(group))
        model(load, group.start)
        return True

    executor = Later()
    load = LayerLoad(executor, layers, copy, lambda _: None)
    executor.job()
    assert [layer for group in found for layer in group] == list(range(layers))
    return found


def test_before_the_model_begins_each_group_is_as_long_as_all_before_it() -> None:
    assert [len(group) for group in groups(30, lambda *_: None)] == [1, 1, 2, 4, 8, 14]


def test_a_model_that_waits_gets_layer_after_layer() -> None:
    found = groups(12, lambda load, there: load.wait(there, 0.0) and None)
    assert [len(group) for group in found] == [1] * 12


def test_a_group_is_no_longer_than_what_the_model_has_before_it() -> None:
    """Here four layers, whenever one begins; more, once that one is there."""

    def model(load: LayerLoad, there: int) -> None:
        if there > 4:
            load.wait(there - 4, 0.0)

    assert [len(group) for group in groups(32, model)] == [1, 1, 2, 4, 8, 12, 4]


def test_who_only_waits_for_the_end_is_not_the_model() -> None:
    found = groups(30, lambda load, _: load.complete(0.0) and None)
    assert [len(group) for group in found] == [1, 1, 2, 4, 8, 14]
