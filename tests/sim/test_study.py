"""Studies: what is simulated of a fleet, and what they say to a buyer."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.sim.test_fleet import TINY

from cairn.errors import InputError
from cairn.index import LRU
from cairn.sim.advice import cheapest, curves, needed, needed_by_tier, sizes
from cairn.sim.machine import H200_8B, Link, Machine, read_machine
from cairn.sim.replay import replay
from cairn.sim.study import Demand, Fleet, Prices, Study, all_of, one_at_a_time, run
from cairn.sim.trace import Trace, read_trace

SLICE = Path(__file__).parents[1] / "data" / "conversation_2000.jsonl"
GB = 10**9


@pytest.fixture(scope="module")
def trace() -> Trace:
    return read_trace(SLICE, limit=400)


def test_what_can_be_hit_is_what_an_endless_cache_hits(trace: Trace) -> None:
    assert trace.reused().tolist() == replay(trace, len(trace.keys), LRU, chunk=0).hits.tolist()


def test_a_repeated_trace_shares_nothing_between_its_copies(trace: Trace) -> None:
    longer = trace.repeated(1000)
    assert len(longer) == 1000
    assert (np.diff(longer.times) >= 0).all()
    assert longer.reused().tolist() == (trace.reused().tolist() * 3)[:1000]
    assert [len(longer.chain(i)) for i in (3, 403, 999)] == [len(trace.chain(i)) for i in (3, 3, 199)]
    assert len(np.unique(longer.keys, axis=0)) == len(longer.keys) == longer.blocks.max() + 1
    rates = [len(one) / (one.times[-1] - one.times[0]) for one in (trace, trace.repeated(800))]
    assert rates[0] == pytest.approx(rates[1], rel=0.01)


def test_more_room_hits_more_and_processes_change_nothing(trace: Trace) -> None:
    study = Study(machine=replace(H200_8B, blocks=400), demand=Demand(rate=3.0))
    fleets = one_at_a_time({"instances": [2], "dram_bytes": [0, 120 * GB, 2000 * GB], "remote_bytes": [0, 2000 * GB]})
    rows = run(study, trace, fleets)
    none, some, all_of_it, remote = (row["of_possible_percent"] for row in rows)
    assert none < some < all_of_it <= 100
    assert remote > all_of_it  # instances share it, and not their DRAM
    assert rows[2]["ttft_p95_s"] < rows[0]["ttft_p95_s"]
    assert run(study, trace, fleets, processes=2) == rows


def test_a_codec_makes_room_and_takes_time() -> None:
    trace = Trace.of([0.0, 1.0], [[0], [0]], [(512, 1), (512, 1)])
    study = Study(machine=H200_8B, demand=Demand(rate=1.0), codec_threads=2)
    fleet = Fleet(remote_bytes=100 * GB, codec="cachegen-high")
    plain, coded = (study.settings(trace, replace(fleet, codec=name)) for name in ("none", "cachegen-high"))
    assert coded.blocks["remote"] == pytest.approx(plain.blocks["remote"] * 16 / 4.23, abs=2)
    assert coded.blocks["dram"] == plain.blocks["dram"] == 0
    byte_s = 4.23 / 16 / 12.5e9 + 1 / 0.828e9 / 2
    assert coded.machine.links["remote"].bytes_s == pytest.approx(1 / byte_s)


def test_blocks_of_another_size_are_the_same_memory(trace: Trace) -> None:
    settings = Study(machine=H200_8B, demand=Demand(rate=1.0)).settings(replace(trace, block_tokens=16), Fleet())
    assert settings.machine.blocks * 16 == H200_8B.blocks * 512


def row(**given: Any) -> dict[str, Any]:
    base = {"instances": 2, "policy": "lru", "codec": "none", "scheduler": "s", "cost_per_hour": 0.0, "meets_slo": True}
    sizes = {f"{tier}_bytes": 0 for tier in ("dram", "disk", "remote")}
    return base | sizes | {name.replace("_bytes", "_total_bytes"): 0 for name in sizes} | given


def test_how_large_a_tier_has_to_be() -> None:
    curve = [
        row(dram_bytes=size, dram_total_bytes=size, of_possible_percent=hits)
        for size, hits in ((0, 30.0), (100 * GB, 80.0), (400 * GB, 100.0))
    ]
    assert needed(curve, "dram") == pytest.approx(200 * GB)
    assert needed(curve[:2], "dram") is None
    assert needed([row(of_possible_percent=95.0)], "dram") == 0
    other = row(remote_bytes=5, remote_total_bytes=5, of_possible_percent=50.0)
    assert list(curves([*curve, other], "dram").values()) == [curve]
    coded = [{**one, "codec": "zip"} for one in curve]
    assert list(curves([*curve, *coded], "dram").values()) == [curve]
    remote = [row(remote_bytes=size, codec=codec) for codec in ("none", "zip") for size in (0, 5)]
    assert [part[0]["codec"] for part in curves(remote, "remote").values()] == ["none", "zip"]
    beside = [{**one, "disk_bytes": 7} for one in curve]
    assert list(curves(beside, "dram").values()) == [beside]
    assert [(one["tier"], one["total_bytes"]) for one in needed_by_tier([*curve, other])] == [
        ("dram", needed(curve, "dram")),
        ("remote", None),
    ]


def test_the_cheapest_that_will_do() -> None:
    rows = [row(cost_per_hour=1.0, meets_slo=False), row(cost_per_hour=3.0), row(cost_per_hour=2.0, instances=4)]
    assert cheapest(rows) == rows[2]
    free = [row(instances=4), row(instances=3, dram_total_bytes=7), row(instances=3)]
    assert cheapest(free) == free[2]
    assert cheapest([row(meets_slo=False)]) is None


def test_prices_are_of_what_is_bought() -> None:
    prices = Prices(gpu=2.0, dram=7.3, disk=0.0, remote=0.73)
    fleet = Fleet(instances=9, dram_bytes=100 * GB, disk_bytes=5 * GB, remote_bytes=1000 * GB)
    assert prices.hourly(fleet, per_host=8) == pytest.approx(18 + 2 * 100 * 7.3 / 730 + 1000 * 0.73 / 730)


def test_combinations() -> None:
    options = {"instances": [1, 2], "dram_bytes": [0, 5, 6], "disk_bytes": [0, 7]}
    assert len(all_of(options)) == 12
    found = one_at_a_time(options)
    assert [(one.dram_bytes, one.disk_bytes) for one in found[:4]] == [(0, 0), (5, 0), (6, 0), (0, 7)]
    assert len(found) == 8


def test_sizes_to_try_end_at_all_there_is(trace: Trace) -> None:
    found = sizes(trace, H200_8B.token_bytes)
    footprint = len(trace.keys) * 512 * H200_8B.token_bytes
    assert found[0] == 0
    assert found == sorted(found)
    assert footprint <= found[-1] < footprint + GB


def test_a_machine_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    fields = '"floor_s": 0.01, "token_s": 1e-5, "attention_s": 1e-9, "read_s": 1e-8, "token_bytes": 2, "blocks": 3'
    path.write_text(f'{{{fields}, "links": {{"disk": {{"latency_s": 0.5, "bytes_s": 2}}}}}}')
    assert read_machine(str(path)).links == {"disk": Link(0.5, 2.0)}
    path.write_text(f'{{"calibrated": {{{fields}}}, "visits": 3}}')
    assert isinstance(read_machine(str(path)), Machine)
    for wrong, says in ((f'{{{fields}, "flor_s": 1}}', "flor_s"), (f'{{{fields}, "links": {{"tape": 1}}}}', "tape")):
        path.write_text(wrong)
        with pytest.raises(InputError, match=says):
            read_machine(str(path))
    path.write_text('{"floor_s": "x"}')
    with pytest.raises(InputError, match="floor_s"):
        read_machine(str(path))
    with pytest.raises(InputError, match="h200-llama-8b"):
        read_machine("h300")


def test_a_tier_without_a_link_is_refused(trace: Trace) -> None:
    study = Study(machine=replace(TINY, links={}, block_tokens=512, blocks=2000), demand=Demand(rate=1.0))
    with pytest.raises(InputError, match=r"links\.disk"):
        run(study, trace, [Fleet(disk_bytes=5)])
