"""What a board tells: history out of counts, one snapshot for all, both bounded."""

import re
from typing import Any, Final

import msgspec
import pytest
from PIL import Image

from cairn.observe.reasons import Reason
from cairn.serve.dashboard.base import (
    PERIOD_S,
    SAMPLES,
    Counts,
    InstanceShown,
    PrefixShown,
    Reading,
    Sample,
    Served,
    TierShown,
)
from cairn.serve.dashboard.board import Board
from cairn.serve.dashboard.pages import page_files, since_of
from cairn.serve.gateway import shown
from tests.serve.dashboard.pictures import IMAGES, page_digest

NOBODY: Final = Served(0, 0, [], [])


class Made:
    """A source that tells what a test has put in."""

    kind: Final = "service"
    name = "made"

    def __init__(self) -> None:
        self.counts: dict[tuple[str, str], Counts] = {}
        self.requests = self.looks = 0

    def count(self, life: tuple[str, str], hit: float, missed: float) -> None:
        self.counts[life] = Counts({"dram": hit}, {"absent": missed}, {"dram": 10 * hit}, {})

    def look(self) -> None:
        pass

    def read(self) -> Reading:
        return Reading(dict(self.counts), NOBODY, requests=self.requests)

    def instances(self) -> list[InstanceShown]:
        self.looks += 1
        return [InstanceShown(name=name) for name, _ in self.counts]

    def tiers(self) -> list[TierShown]:
        return [TierShown(tier="dram", capacity_bytes=100, used_bytes=50)]

    def hot(self) -> tuple[list[PrefixShown], int]:
        return [], 0


def told(board: Board, since: int = -1) -> dict[str, Any]:
    state: dict[str, Any] = msgspec.json.decode(board.state(since))
    state["samples"] = [msgspec.convert(one, Sample) for one in state["samples"]]
    return state


def test_a_sample_is_what_was_counted_in_its_period() -> None:
    source = Made()
    source.count(("a", "1"), 100, 50)
    source.requests = 7
    board = Board(source, clock=lambda: 12.5)
    source.count(("a", "1"), 130, 60)
    source.count(("b", "1"), 9, 9)  # unknown until now: nobody knows when it counted that
    source.requests = 9
    board.sample()
    source.count(("b", "1"), 19, 9)
    board.sample()
    first, second = told(board)["samples"]
    assert first == Sample(
        t=12.5, requests=2, hit_tokens={"dram": 30}, missed_tokens={"absent": 10}, load_bytes={"dram": 300}
    )
    assert second == Sample(t=12.5, hit_tokens={"dram": 10}, load_bytes={"dram": 100})
    rates = {one["name"]: one.get("hit_rate") for one in told(board)["instances"]}
    assert rates == {"a": pytest.approx(30 / 40), "b": pytest.approx(1.0)}


def test_counts_that_begin_anew_are_not_negative() -> None:
    source = Made()
    source.count(("a", "1"), 100, 50)
    board = Board(source)
    source.count(("a", "1"), 4, 50)
    board.sample()
    source.counts.clear()
    board.sample()
    first, second = told(board)["samples"]
    assert (first.hit_tokens, first.missed_tokens) == ({"dram": 4}, {})
    assert not second.hit_tokens


def test_everybody_gets_the_same_snapshot_of_a_period() -> None:
    source = Made()
    board = Board(source)
    for _ in range(5):
        board.sample()
        assert [board.state() for _ in range(3)] == 3 * [board.state()]
        board.state(since=2)
    assert source.looks == 5
    board.sample()
    assert source.looks == 5, "nobody looked"


def test_who_has_samples_gets_those_that_came_since() -> None:
    source, now = Made(), [0.0]
    board = Board(source, clock=lambda: now[0])
    for i in range(SAMPLES + 40):
        now[0] = i * PERIOD_S
        board.sample()
    last = SAMPLES + 40
    every = [one.t for one in told(board)["samples"]]
    assert len(every) == SAMPLES
    assert every[-1] == (last - 1) * PERIOD_S
    for since, expected in ((last, 0), (last - 1, 1), (last - 7, 7), (3, SAMPLES), (-1, SAMPLES), (10**9, 0)):
        state = told(board, since)
        assert (state["seq"], len(state["samples"])) == (last, expected)
        assert [one.t for one in state["samples"]] == every[len(every) - expected :]


@pytest.mark.parametrize(("query", "number"), [(b"", -1), (b"since=12", 12), (b"since=-3", -1), (b"since=x", -1)])
def test_the_number_that_is_asked_for(query: bytes, number: int) -> None:
    assert since_of(query) == number


def test_the_page_is_small_and_needs_nothing_from_elsewhere() -> None:
    files = page_files()
    assert {path.rpartition("/")[2] for path in files} >= {"", "index.html", "style.css", "dashboard.js", "icon.svg"}
    found = {path: one.body for path, one in files.items() if not path.endswith("/")}
    assert files["/dashboard"].headers == [(b"location", b"dashboard/")]
    assert sum(map(len, found.values())) < 60_000
    for body in found.values():
        assert b"https://" not in body
        assert b"http://" not in body.replace(b"http://www.w3.org/", b"")


def test_the_page_knows_tiers_and_reasons_by_their_names() -> None:
    script = page_files()["/dashboard/dashboard.js"].body.decode()
    lines = dict(re.findall(r"^const (\w+) = (.*)", script, re.MULTILINE))
    assert re.findall(r"(\w+): ", lines["TIERS"]) == [*shown._ORDER]
    told = re.findall(r"(\w+): ", lines["WHY"]) + re.findall(r'"(\w+)"', lines["FAULTS"])
    assert {*told} <= {*map(str, Reason)}


def test_the_pictures_in_the_documentation_are_of_this_page() -> None:
    found = {path.name: Image.open(path).info.get("page") for path in IMAGES.glob("dashboard-*.png")}
    assert found == dict.fromkeys(["dashboard-360.png", "dashboard-dark.png", "dashboard-light.png"], page_digest()), (
        "make pictures"
    )
