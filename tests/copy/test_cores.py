"""Copies beside a model whose threads are bound to cores, as OpenMP does in vLLM's workers on CPUs."""

import os
import shlex
import subprocess
import sys

import numpy as np
import pytest

from cairn.copy import CpuCopier, PagedKV, Progress, cpu
from cairn.kv import KVGeometry

#: Binds itself to one core, as OpenMP binds whoever loads it, and prints where a thread of a copier may run.
_BOUND = """
import os
os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
from cairn.copy import CpuCopier
from cairn.kv import KVGeometry
copier = CpuCopier(KVGeometry(layers=1, kv_heads=1, head_dim=1, block_tokens=1), 2)
print(*sorted(copier._pool.submit(os.sched_getaffinity, 0).result()))
"""


def _cores_of_copies(*, bound: bool, through_a_shell: bool = False) -> set[int]:
    """Where copies may run in a process that is bound to one core, by OpenMP or by somebody else."""
    environ = {name: value for name, value in os.environ.items() if "OMP" not in name and "KMP" not in name}
    if bound:
        environ["GOMP_CPU_AFFINITY"] = "1"
    command = [sys.executable, "-c", _BOUND]
    if through_a_shell:  # which stays, as it has more to do
        command = ["sh", "-c", f"{shlex.join(command)}; true"]
    run = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    return {int(core) for core in run.stdout.split()}


def test_copies_run_on_cores_that_are_left_to_them() -> None:
    assert _cores_of_copies(bound=True) == os.sched_getaffinity(0)


def test_a_limit_that_is_no_binding_of_openmp_holds() -> None:
    one = {max(os.sched_getaffinity(0))}
    assert _cores_of_copies(bound=False) == one
    assert _cores_of_copies(bound=True, through_a_shell=True) == one, "a shell's cores are not vLLM's"


@pytest.mark.parametrize(
    ("cores", "share_bytes", "beside"),
    [(1, 64, 1), (2, 64, 1), (4, 64, 2), (64, 64, 3), (64, 128, 2), (64, 129, 1), (64, 1 << 20, 1)],
)
def test_layers_that_a_model_follows_leave_it_cores_and_the_gil(
    cores: int, share_bytes: int, beside: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the cores, and one thread where shares of the 256 bytes of a layer would be small."""
    monkeypatch.setattr(cpu, "usable_cores", lambda: set(range(cores)))
    g = KVGeometry(layers=2, kv_heads=1, head_dim=4, dtype="float16", block_tokens=2)
    rng = np.random.default_rng(0)
    pages = [rng.integers(0, 1 << 16, (2, 8, 2, 1, 4), dtype=np.uint16) for _ in range(2)]
    back = [np.zeros_like(page) for page in pages]
    shares: list[int] = []

    class Counting(CpuCopier):
        def _sides(self, kv, slots, memory, rows, part):  # type: ignore[no-untyped-def]
            shares.append(part.stop - part.start)
            return super()._sides(kv, slots, memory, rows, part)

    monkeypatch.setattr(Counting, "share_bytes", share_bytes)
    copier, slots = Counting(g, 3), np.arange(16, dtype=np.int64)
    memory, rows = np.zeros((8, g.block_bytes), np.uint8), np.arange(8, dtype=np.int32)
    copier.gather(PagedKV.from_tensors(pages, "nhd", g), slots, memory, rows)
    assert len(shares) == 3
    kv = PagedKV.from_tensors(back, "nhd", g)
    for layer in range(2):
        shares.clear()
        copier.scatter(kv, slots, memory, rows, range(layer, layer + 1))
        assert (len(shares), sum(shares)) == (beside, 8)
    assert all((a == b).all() for a, b in zip(pages, back, strict=True))
    for page in back:
        page[:] = 0
    monkeypatch.setattr(Counting, "share_bytes", 2 * share_bytes)
    shares.clear()
    copier.scatter_layers(kv, slots, memory, rows, Progress(2))
    assert (len(shares), sum(shares)) == (beside, 8), "of all layers together"
    assert all((a == b).all() for a, b in zip(pages, back, strict=True))
    copier.close()
