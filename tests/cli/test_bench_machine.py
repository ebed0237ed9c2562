"""`cairn bench machine`: costs that are known come out of the visits that they would cause."""

import pytest

from cairn.cli.bench_machine import Visit, machine_of
from cairn.kv import KVGeometry

GEOMETRY = KVGeometry(layers=2, kv_heads=1, head_dim=64, dtype="float32", block_tokens=16)


def visit(prompt: int, dram: int = 0, disk: int = 0) -> Visit:
    """20 ms, 1 ms a token, 2 us a pair; DRAM: 3 ms and 1 GB/s; disk: 8 ms and 0.1 GB/s; 5 ms a decoded token."""
    reused, new = dram + disk, prompt - dram - disk
    seconds = 0.020 + 1e-3 * new + 2e-6 * new * (reused + new / 2)
    seconds += (0.003 + dram * GEOMETRY.token_bytes / 1e9) * (dram > 0)
    seconds += (0.008 + disk * GEOMETRY.token_bytes / 1e8) * (disk > 0)
    held = {"dram": dram, "disk": disk}
    return Visit(seconds, seconds + 0.050, (9.0, 9.0), prompt, list(range(11)), {k: n for k, n in held.items() if n})


def test_costs_come_out_of_visits() -> None:
    lengths = (64, 224, 480, 960)
    visits = [one for n in lengths for one in (visit(n), visit(n + 32, dram=n), visit(n + 32, disk=n))]
    machine = machine_of(visits, GEOMETRY)
    assert machine.floor_s == pytest.approx(0.005)
    assert (machine.fixed_s, machine.token_s, machine.attention_s) == pytest.approx((0.020, 1e-3, 2e-6), rel=0.02)
    dram, disk = machine.links["dram"], machine.links["disk"]
    assert (dram.latency_s, dram.bytes_s) == pytest.approx((0.003, 1e9), rel=0.1)
    assert (disk.latency_s, disk.bytes_s) == pytest.approx((0.008, 1e8), rel=0.1)
    assert machine_of([one.by_cpu() for one in visits], GEOMETRY).floor_s == 0.0
