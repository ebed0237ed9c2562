"""Reading traces: what is kept, and how bad lines are refused."""

from pathlib import Path

import numpy as np
import pytest

from cairn.errors import InputError
from cairn.sim.trace import Trace, read_trace

SLICE = Path(__file__).parents[1] / "data" / "conversation_2000.jsonl"
GOOD = '{"timestamp": 1500, "input_length": 900, "output_length": 7, "hash_ids": [0, 1]}'


def test_slice_is_read_whole() -> None:
    trace = read_trace(SLICE)
    assert len(trace) == 2000
    assert trace.block_uses == trace.starts[-1] == len(trace.blocks)
    assert (np.diff(trace.times) >= 0).all()
    assert (np.diff(trace.starts) == -(-trace.input_tokens // 512)).all()
    assert len(np.unique(trace.keys, axis=0)) == len(trace.keys) == trace.blocks.max() + 1


def test_equal_ids_have_equal_keys_and_dense_ids_count_from_first_use() -> None:
    trace = Trace.of([2.0, 1.0], [[7, 9], [7, 8]])
    assert trace.times.tolist() == [1.0, 2.0]
    assert trace.blocks.tolist() == [0, 1, 0, 2]
    first, second = trace.chain(0), trace.chain(1)
    assert (first[0] == second[0]).all()
    assert (first[1] != second[1]).any()


def test_seconds_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n\n{GOOD}\n")
    assert read_trace(path).times.tolist() == [1.5, 1.5]
    assert len(read_trace(path, limit=1)) == 1


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "line 2"),
        ('{"timestamp": 1}', "hash_ids"),
        ('{"timestamp": "x", "hash_ids": []}', "timestamp"),
        ('{"timestamp": 1, "hash_ids": [0, -1]}', "negative"),
        (f'{{"timestamp": 1, "hash_ids": [{1 << 63}]}}', "hash_ids"),
        (f'{{"timestamp": 1, "hash_ids": [0], "input_length": {1 << 63}}}', "input_length"),
        ('{"timestamp": 1, "hash_ids": [0], "output_length": -1}', "output_length"),
        ('{"timestamp": 1, "hash_ids": [1]}', "follows -1 here and 0 earlier"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(f"{GOOD}\n{line}\n")
    with pytest.raises(InputError, match=says) as refused:
        read_trace(path)
    assert "line 2" in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("content", [None, ""])
def test_no_trace(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "t.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=str(path)):
        read_trace(path)
