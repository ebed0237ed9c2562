"""The hash table under keys that were chosen against it: equal homes, equal tags, wrap-around."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.index.slots import NONE, new_slots
from cairn.index.table import new_table, table_delete, table_find, table_insert

#: Few homes, two of them at the table's end so that probes wrap around; few tags; few low halves.
keys = st.tuples(
    st.sampled_from([0, 1, 14, 15]).flatmap(lambda home: st.integers(0, 2).map(lambda high: high << 40 | home)),
    st.integers(0, 1).flatmap(lambda tag: st.integers(0, 3).map(lambda low: tag << 32 | low)),
)


@settings(max_examples=400, deadline=None)
@given(steps=st.lists(keys, max_size=60))
def test_table_is_a_dict(steps: list[tuple[int, int]]) -> None:
    """Each step adds a key, or removes it if it is there."""
    slots, table = new_slots(10), new_table(10)
    held: dict[tuple[int, int], int] = {}
    for key in steps:
        if key in held:
            table_delete(table, slots, held.pop(key))
        elif len(held) < 10:
            slot = next(slot for slot in range(10) if slot not in held.values())
            slots[slot]["key0"], slots[slot]["key1"] = key
            table_insert(table, np.uint64(key[0]), np.uint64(key[1]), slot)
            held[key] = slot
        for other in {*held, *steps}:
            assert table_find(table, slots, np.uint64(other[0]), np.uint64(other[1])) == held.get(other, NONE)
        assert np.count_nonzero(table) == len(held)


@pytest.mark.parametrize("capacity", [1, 2, 10, 1000, 1 << 20])
def test_table_has_room(capacity: int) -> None:
    assert capacity / len(new_table(capacity)) <= 2 / 3
