"""The whole demo, with real processes and a tiny model; and its ends: table, plot, JSON, one line for a mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cairn.cli.demo.events import Answer
from cairn.cli.demo.plot import draw
from cairn.cli.demo.report import Question, Report, describe_machine
from cairn.cli.demo.run import _judge
from cairn.errors import CairnError, StorageError
from tests.demo.tiny import save_tiny_model


def cairn_demo(*arguments: str | Path) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-c", "from cairn.cli import main; main()", "demo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)


@pytest.mark.slow
def test_the_demo_from_end_to_end(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    (tmp_path / "text").write_text("A cairn guides travellers. " * 60)
    done = cairn_demo(
        *("--model", tmp_path / "model", "--cache-dir", tmp_path / "cache", "--text", tmp_path / "text"),
        *("--tokens", "400", "--question", "Whom?", "--answer-tokens", "20", "-o", tmp_path / "plot.png", "--json"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    question = report["questions"][0]
    assert report["summary"]["identical"]
    assert question["plain"]["token_ids"] == question["disk"]["token_ids"]
    assert len(question["plain"]["token_ids"]) == 20
    assert (question["cold"]["dram_tokens"], question["cold"]["disk_tokens"]) == (0, 0)
    assert (question["dram"]["dram_tokens"], question["dram"]["disk_tokens"]) == (399, 0)
    assert (question["disk"]["dram_tokens"], question["disk"]["disk_tokens"]) == (0, 399)
    assert question["disk"]["loaded_bytes"] == 399 * report["kv_token_bytes"]
    assert "from disk" in done.stderr
    assert Image.open(tmp_path / "plot.png").size == (1500, 690)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_prompt_over_the_context_is_one_line(tmp_path: Path) -> None:
    done = cairn_demo("--tokens", "8192", "--cache-dir", tmp_path)
    assert done.returncode == 2
    assert done.stderr == (
        "cairn: --tokens 8192: the model's context is 8192, of which the answer takes 32; use at most 8160\n"
    )
    assert list(tmp_path.iterdir()) == []


def answer(seconds: float, tokens: list[int]) -> Answer:
    return Answer(question=0, ttft_s=seconds, total_s=seconds, prompt_tokens=4096, token_ids=tokens, text="")


def report_of(disk_tokens: list[int]) -> Report:
    same = [1, 2]
    rows = [
        Question("a", answer(9.0, same), answer(0.2, same), answer(0.3, disk_tokens), answer(9.1, same)),
        Question("b", answer(11.0, same), answer(0.4, same), answer(0.5, same)),
    ]
    return Report("machine", "date", "model", "float32", "text", "free", 4096, 46080, {"cairn": "1"}, rows, 0.1)


def test_the_summary_is_of_medians_and_shares() -> None:
    summary = report_of([1, 2]).summary()
    assert (summary.ttft_plain_s, summary.ttft_cold_s) == (10.0, 9.1)
    assert summary.dram_share == pytest.approx(0.03)
    assert summary.disk_share == pytest.approx(0.04)
    assert summary.identical
    assert not report_of([1, 3]).summary().identical
    assert json.loads(report_of([1, 2]).to_json())["summary"]["identical"] is True


def test_a_run_that_shows_nothing_is_no_success() -> None:
    with pytest.raises(CairnError, match="differs"):
        _judge(report_of([1, 3]))
    report = report_of([1, 2])
    with pytest.raises(CairnError, match="Q1 found nothing"):
        _judge(report)
    for question in report.questions:
        question.dram.dram_tokens = question.disk.disk_tokens = 4080
    _judge(report)


def test_the_plot_is_a_picture_or_an_error(tmp_path: Path) -> None:
    draw(report_of([1, 2]), tmp_path / "plot.png")
    with Image.open(tmp_path / "plot.png") as image:
        colours = image.convert("RGB").getcolors(1 << 20) or []
    assert image.size == (1500, 690)
    assert {(138, 143, 152), (31, 111, 180), (42, 157, 143)} <= {colour for _, colour in colours}
    with pytest.raises(StorageError, match="--output"):
        draw(report_of([1, 2]), tmp_path / "missing" / "plot.png")


def test_the_machine_has_a_name() -> None:
    assert describe_machine().endswith("cores")
