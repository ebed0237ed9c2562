"""`cairn bench disk`: the disk tier beside bare O_DIRECT I/O of the same shape, in the same minutes."""

import gc
import mmap
import os
import random
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.base import Octets
from cairn.codec.frame import checksum_of
from cairn.errors import StorageError
from cairn.kv import KeyChain, Keys, KVGeometry, Namespace
from cairn.tier.arena import Arena
from cairn.tier.base import Outcomes, Rows
from cairn.tier.disk import DEFAULT_THREADS, DiskTier
from cairn.tier.disk_directory import PAGE

#: Llama-3.1-8B: 2 MiB a block of 16 tokens; and a small model: 384 KiB.
LARGE: Final = KVGeometry(layers=32, kv_heads=8, head_dim=128, block_tokens=16)
SMALL: Final = KVGeometry(layers=24, kv_heads=2, head_dim=128, block_tokens=16)

BYTES: Final = 512 << 20
ROUNDS: Final = 11
CHAIN_BLOCKS: Final = 16
TIMEOUT_S: Final = 120.0

Order = Sequence[int]
#: (row, slot) of each block.
Moves = list[tuple[int, int]]


def run_disk(directory: Path | None = None, *, threads: int = DEFAULT_THREADS, rounds: int = ROUNDS) -> dict[str, Any]:
    """Shares of the bare device's throughput, as medians over rounds of the ratio within a round.

    In every round the same chains of blocks are moved in a new order by the tier and by as many threads with bare
    preadv/pwritev over a file of the same size at the same offsets, once without and once with the checksum that
    proves a block; who comes first alternates at random. Takes about 1.1 GiB of `directory` (the system's temporary one
    unless given) and gives it back. Raises StorageError without that room.
    """
    gc.collect()
    gc.freeze()  # what the imports left behind is not to be collected while something is timed
    with _room(directory) as place:
        large = _bench(Path(place) / "large", LARGE, threads, rounds)
        small = _bench(Path(place) / "small", SMALL, threads, rounds)
    return {
        "read_share_of_raw": large["read_share_of_raw"],
        "write_share_of_raw": large["write_share_of_raw"],
        "threads": threads,
        "rounds": rounds,
        "block_2mib": large,
        "block_384kib": small,
    }


def _room(directory: Path | None) -> "tempfile.TemporaryDirectory[str]":
    try:
        return tempfile.TemporaryDirectory(prefix="cairn-bench-", dir=directory)
    except OSError as error:
        raise StorageError(f"--dir {directory}: {error.strerror}; name one that can be written") from None


def _bench(place: Path, geometry: KVGeometry, threads: int, rounds: int) -> dict[str, Any]:
    bench = _Bench(place, geometry, threads)
    try:
        bench.round()  # the first touch of every slot on both sides costs more, and is not counted
        bench.forget()
        for _ in range(rounds):
            bench.round()
        bench.check()
        return bench.result()
    finally:
        bench.close()
        shutil.rmtree(place)


class _Bench:
    """A tier and a bare file of the same size, and one arena that both move to and from."""

    def __init__(self, place: Path, geometry: KVGeometry, threads: int) -> None:
        stride = geometry.block_bytes
        self._chain_count = BYTES // stride // CHAIN_BLOCKS
        blocks = self._chain_count * CHAIN_BLOCKS
        self._bytes = blocks * stride
        self._namespace = Namespace(model="bench", geometry=geometry).digest()
        self._tier = DiskTier(
            place / "tier",
            geometry=geometry,
            capacity_bytes=blocks * (PAGE + stride + 256) + (128 << 10),
            threads=threads,
        )
        self._memory = Arena(blocks, stride)
        self._arena = self._memory.memory
        self._bare = _Bare(place / "bare", self._arena, int(self._tier.stats()["capacity_blocks"]), threads)
        self._slots = list(range(blocks))  # where the tier has put each row
        self._prompts = 0
        self._random = random.Random(0)
        self._numbers = np.random.default_rng(0)
        self.forget()

    def forget(self) -> None:
        self._seconds: dict[str, list[float]] = {
            f"{whose}{kind}": [] for kind in ("write", "read") for whose in ("", "raw_", "summed_raw_")
        }

    def round(self) -> None:
        """New chains are written, then read, each in a new order."""
        self._fill()
        chains = [self._new_chain() for _ in range(self._chain_count)]
        self._race("write", lambda order: self._write(chains, order), self._bare.write)
        self._slots = [int(slot) for chain in chains for slot in self._tier.slots_of(chain)]
        self._race("read", lambda order: self._read(chains, order), self._bare.read)

    def check(self) -> None:
        """That the tier really moves what it is timed for."""
        self._fill()
        wanted, chains = self._arena.copy(), [self._new_chain() for _ in range(self._chain_count)]
        self._write(chains, range(len(chains)))
        self._arena[:] = 0
        self._read(chains, range(len(chains)))
        if not np.array_equal(self._arena, wanted):
            raise AssertionError("the bench did not move what it timed")

    def result(self) -> dict[str, float]:
        figures: dict[str, float] = {}
        for kind in ("read", "write"):
            mine = self._seconds[kind]
            figures[f"{kind}_gb_per_s"] = round(self._bytes / statistics.median(mine) / 1e9, 3)
            for raw in ("raw", "summed_raw"):
                bare = self._seconds[f"{raw}_{kind}"]
                shares = [b / m for m, b in zip(mine, bare, strict=True)]
                figures[f"{kind}_share_of_{raw}"] = round(statistics.median(shares), 3)
                figures[f"{raw}_{kind}_gb_per_s"] = round(self._bytes / statistics.median(bare) / 1e9, 3)
        return figures

    def close(self) -> None:
        self._tier.close(TIMEOUT_S)
        self._bare.close()

    def _fill(self) -> None:
        # Enough that no two blocks are alike and none is a run of zeros, for devices that look.
        words = self._arena.view(np.uint64)
        words[:] = self._numbers.integers(0, 1 << 63, words.shape[1], np.uint64)
        words ^= self._numbers.integers(0, 1 << 63, (len(words), 1), np.uint64)

    def _new_chain(self) -> Keys:
        self._prompts += 1
        return KeyChain(self._namespace, 16, np.full(16 * CHAIN_BLOCKS, self._prompts, np.uint32)).keys

    def _race(self, kind: str, mine: Callable[[Order], None], bare: "Callable[[Moves, bool], None]") -> None:
        order = self._random.sample(range(self._chain_count), self._chain_count)
        rows = [chain * CHAIN_BLOCKS + block for chain in order for block in range(CHAIN_BLOCKS)]
        moves = [(row, self._slots[row]) for row in rows]
        runs: list[tuple[str, Callable[[], None]]] = [
            (kind, lambda: mine(order)),
            (f"raw_{kind}", lambda: bare(moves, False)),
            (f"summed_raw_{kind}", lambda: bare(moves, True)),
        ]
        self._random.shuffle(runs)
        for name, run in runs:
            started = time.perf_counter()
            run()
            self._seconds[name].append(time.perf_counter() - started)

    def _write(self, chains: list[Keys], order: Order) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        self._wait(
            [self._tier.write(chains[i], 0, self._rows(i), namespace=self._namespace, deadline=deadline) for i in order]
        )

    def _read(self, chains: list[Keys], order: Order) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        self._wait([self._tier.read(chains[i], 0, self._rows(i), deadline=deadline) for i in order])

    def _rows(self, chain: int) -> Rows:
        return Rows(self._arena, np.arange(chain * CHAIN_BLOCKS, (chain + 1) * CHAIN_BLOCKS, dtype=np.int32))

    def _wait(self, futures: "list[Future[Outcomes]]") -> None:
        reasons = {reason for future in futures for reason in future.result(TIMEOUT_S)}
        if reasons != {None}:
            raise AssertionError(f"the bench did not move what it timed: {reasons}")


class _Bare:
    """Bare O_DIRECT I/O: threads that take the next (row, slot) and move page and row with one system call."""

    def __init__(self, path: Path, arena: npt.NDArray[np.uint8], slots: int, threads: int) -> None:
        self._arena = arena
        self._slot_bytes = PAGE + arena.shape[1]
        self._threads = threads
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        os.posix_fallocate(self._fd, 0, slots * self._slot_bytes)
        os.close(self._fd)
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_DIRECT)
        except OSError:  # the tier goes without it there, too
            self._fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)

    def write(self, moves: Moves, summed: bool) -> None:
        self._run(moves, os.pwritev, before=checksum_of if summed else None)

    def read(self, moves: Moves, summed: bool) -> None:
        self._run(moves, os.preadv, after=checksum_of if summed else None)

    def close(self) -> None:
        os.close(self._fd)

    def _run(
        self,
        moves: Moves,
        call: Callable[[int, list[Any], int], int],
        before: Callable[[Octets], bytes] | None = None,
        after: Callable[[Octets], bytes] | None = None,
    ) -> None:
        remaining, short = iter(moves), []

        def work() -> None:
            page = mmap.mmap(-1, PAGE)
            for row, slot in remaining:
                if before:
                    before(self._arena[row])
                if call(self._fd, [page, self._arena[row].data], slot * self._slot_bytes) != self._slot_bytes:
                    short.append(slot)
                if after:
                    after(self._arena[row])

        threads = [threading.Thread(target=work) for _ in range(self._threads)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if short:
            raise AssertionError(f"bare I/O of slot {short[0]} was cut short")
