"""The bench behind `cairn bench index`: what a prefix index costs, per resident block, in time and in memory."""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

SIZES = (100_000, 1_000_000, 10_000_000)
CHAIN_BLOCKS = (64, 256)
LOOKUP_BLOCKS = 8192


def run_index(sizes: Sequence[int] = SIZES, policies: Sequence[str] | None = None) -> dict[str, Any]:
    """Every policy at every size, each in a process of its own, so that memory is what the process really grew by.

    `fill_us` and `evict_us` are per block: reservation and commit of chains of 64 to 256 blocks into an empty index,
    and into a full one, where each block evicts another and every fourth chain returns. Sizes are in resident blocks.
    """
    from cairn.index import POLICIES

    by_policy: dict[str, Any] = {}
    for name in policies if policies is not None else tuple(POLICIES):
        by_policy[name] = {str(size): _apart(name, size) for size in sizes}
    return {"resident_blocks": by_policy}


def _apart(policy: str, size: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "cairn.cli.bench_index", policy, str(size)]
    done = subprocess.run(command, capture_output=True, check=True, text=True, timeout=600)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def measure(policy: str, size: int) -> dict[str, float]:
    """One policy at one size in this process, which must not have held an index of this size before."""
    from cairn.index import POLICIES, PrefixIndex

    _fill(PrefixIndex(4096, POLICIES[policy]), _Chains(1), 16384)  # compiles
    chains = _Chains(2)
    before = _resident_bytes()
    start = time.perf_counter()
    index = PrefixIndex(size, POLICIES[policy])
    made = time.perf_counter() - start
    fill = _fill(index, chains, size)
    memory = _resident_bytes() - before
    chains.repeat = 4
    turnover = max(size // 2, 200_000)
    steady = [_fill(index, chains, turnover // 5) for _ in range(5)]
    memory = max(memory, _resident_bytes() - before)
    keys = _store(index, chains.new(LOOKUP_BLOCKS))
    return {
        "create_ms": 1e3 * made,
        "fill_us_per_block": fill,
        "evict_us_per_block": statistics.median(steady),
        "bytes_per_block": memory / size,
        f"match_us_{LOOKUP_BLOCKS}_blocks": _median_us(lambda: index.match(keys)),
        f"pin_unpin_us_{LOOKUP_BLOCKS}_blocks": _median_us(lambda: index.unpin(index.pin(keys))),
    }


class _Chains:
    """Random chains; with `repeat` n, every n-th is one of the last thousand again."""

    def __init__(self, seed: int) -> None:
        import numpy as np

        self._random = np.random.default_rng(seed)
        self._recent: list[tuple[int, int]] = []
        self._made = 0
        self.repeat = 0

    def new(self, blocks: int) -> Any:
        return self._keys(int(self._random.integers(1 << 62)), blocks)

    def next(self) -> Any:
        self._made += 1
        if self.repeat and self._made % self.repeat == 0 and self._recent:
            seed, blocks = self._recent[int(self._random.integers(len(self._recent)))]
        else:
            seed, blocks = int(self._random.integers(1 << 62)), int(self._random.integers(*CHAIN_BLOCKS, endpoint=True))
            self._recent.append((seed, blocks))
            del self._recent[:-1000]
        return self._keys(seed, blocks)

    @staticmethod
    def _keys(seed: int, blocks: int) -> Any:
        import numpy as np

        return np.random.default_rng(seed).integers(0, 1 << 64, (blocks, 2), np.uint64)


def _store(index: Any, keys: Any) -> Any:
    first = index.touch(keys)
    if first < len(keys):
        index.commit(keys, first, index.reserve(len(keys) - first))
    return keys


def _fill(index: Any, chains: _Chains, blocks: int) -> float:
    """Stores chains until `blocks` new ones are in; microseconds a block, without the time to make the keys."""
    done, spent = 0, 0.0
    while done < blocks:
        keys = chains.next()
        start = time.perf_counter()
        first = index.touch(keys)
        if first < len(keys):
            index.commit(keys, first, index.reserve(len(keys) - first))
        spent += time.perf_counter() - start
        done += len(keys) - first
    return 1e6 * spent / done


def _median_us(call: Callable[[], object], times: int = 51) -> float:
    samples = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return 1e6 * statistics.median(samples)


def _resident_bytes() -> int:
    with open("/proc/self/statm") as file:  # noqa: PTH123 - not a file to be found by a path object
        pages = int(file.read().split()[1])
    import resource

    return pages * resource.getpagesize()


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1], int(sys.argv[2]))))
