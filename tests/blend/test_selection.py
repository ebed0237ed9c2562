"""Which tokens are computed anew."""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cairn.blend import Piece
from cairn.blend.forward import Recipe
from cairn.blend.selection import deviation, keep
from cairn.plan import Blend


@given(
    st.lists(
        st.tuples(st.integers(0, 1000) | st.just(math.inf) | st.just(math.nan), st.booleans()), min_size=1, max_size=30
    ),
    st.integers(0, 40),
)
@settings(deadline=None)
def test_forced_rows_and_the_largest_others(rows: list[tuple[float, bool]], count: int) -> None:
    deviations = torch.tensor([float(value) for value, _ in rows])
    forced = torch.tensor([force for _, force in rows])
    kept = keep(deviations, forced, count).tolist()
    assert kept == sorted(set(kept))
    others = [i for i in range(len(rows)) if not rows[i][1]]
    chosen = [i for i in kept if not rows[i][1]]
    assert len(kept) - len(chosen) == len(rows) - len(others)
    assert len(chosen) == min(count, len(others))
    value = [math.inf if math.isnan(row[0]) else row[0] for row in rows]
    left = [value[i] for i in others if i not in chosen]
    assert not left or not chosen or min(value[i] for i in chosen) >= max(left)


def test_deviation_is_of_keys_and_values() -> None:
    planes = torch.randn(9, 2, 4), torch.randn(9, 2, 4)
    positions = torch.tensor([1, 4, 5, 8])
    keys, values = (plane[positions] for plane in planes)
    assert not deviation(keys, values, planes, positions).any()
    keys, values = keys.clone(), values.clone()
    keys[1] += 1
    values[3] += 1
    assert deviation(keys, values, planes, positions).nonzero()[:, 0].tolist() == [1, 3]


def test_what_blending_computes() -> None:
    pieces = [Piece(100, 500), Piece(510, 910)]

    def share(recipe: Recipe) -> float:
        return Blend(1001, 0, 1000, pieces, *recipe, layers=30).share

    assert share(Recipe((1,), (1.0,))) == 1
    assert share(Recipe((1,), (0.0,), 0)) == 0.2
    assert share(Recipe((1, 10), (0.3, 0.1), 5)) == (1000 + 9 * (210 + 240) + 20 * (210 + 80)) / 30_000
