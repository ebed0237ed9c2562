"""`cairn events`: what is recorded, published again and recorded once more is the same."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from tests.fleet.peers import free_endpoint

from cairn.cli.events import _paced
from cairn.fleet.base import Source
from cairn.fleet.recording import Message, Recorder, Recording

Run = Callable[..., subprocess.CompletedProcess[str]]
SAMPLE = Path(__file__).parents[1] / "data" / "vllm_kv_events.bin"


def test_the_sample_in_figures(run: Run) -> None:
    found = json.loads(run("events", "show", SAMPLE, "--json").stdout)
    assert found["messages"] == 13
    assert found["events"] == {"stored": 12, "removed": 3, "cleared": 1}
    assert found["blocks"] == {"stored_vram": 136, "removed_vram": 3}
    assert found["sources"] == {"-/0": {"messages": 13, "first": 0, "last": 12}}
    assert (found["breaks"], found["torn"], found["skipped_events"]) == (0, False, {})
    assert "stored_vram" in run("events", "show", SAMPLE).stdout


def test_replayed_and_recorded_again(run: Run, tmp_path: Path) -> None:
    endpoint, replay, copy = free_endpoint(), free_endpoint(), tmp_path / "copy"
    options = ["--endpoint", endpoint, "--replay", replay, "--speed", "0", "--stay", "60"]
    command = [sys.executable, "-c", "from cairn.cli import main; main()", "events", "replay", str(SAMPLE), *options]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as publishing:
        recording = ("--endpoint", endpoint, "--replay", replay, "--messages", 13, "--seconds", 60, "--name", "vllm")
        ended = run("events", "record", copy, *recording)
        publishing.kill()
    assert ended.stdout == f"13 messages in {copy}\n"
    again = list(Recording(copy))
    original = list(Recording(SAMPLE))
    assert [(one.sequence, one.payload) for one in again] == [(one.sequence, one.payload) for one in original]
    assert {one.source for one in again} == {Source("vllm", 0)}
    assert all(one.time > 1.7e9 for one in again)


def recording(path: Path, *messages: Message) -> Path:
    with Recorder(path) as recorder:
        for message in messages:
            recorder.write(message)
    return path


def message(instance: str, sequence: int, rank: int = 0) -> Message:
    return Message(1e9 + sequence, Source(instance, rank), b"kv", sequence, msgspec.msgpack.encode([1.0, [], rank]))


def test_a_torn_recording_is_read_up_to_the_tear(run: Run, tmp_path: Path) -> None:
    path = recording(tmp_path / "events", message("a", 0), message("a", 1), message("a", 5))
    found = json.loads(run("events", "show", path, "--json").stdout)
    assert (found["messages"], found["seconds"], found["breaks"], found["torn"]) == (3, 5.0, 1, False)
    whole = path.read_bytes()
    for cut in (1, 20, 45):
        path.write_bytes(whole[:-cut])
        found = json.loads(run("events", "show", path, "--json").stdout)
        assert (found["messages"], found["torn"]) == (2, True)


@pytest.mark.parametrize(
    "content", [b"not a recording at all, but long enough", b"CAIRNKV1\x02\0\0\0{}\x01\0\0\0\0\0\0\0"]
)
def test_what_is_no_recording(run: Run, tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x").write_bytes(content)
    ended = run("events", "show", tmp_path / "x", "--json")
    assert ended.returncode == 1 or json.loads(ended.stdout)["torn"]


def test_mistakes_end_in_a_line(run: Run, tmp_path: Path) -> None:
    path = recording(tmp_path / "events", message("a", 0), message("b", 0), message("b", 0, rank=1))
    for arguments, code, words in [
        (["record", path, "--endpoint", "tcp://127.0.0.1:1"], 1, "is not there yet"),
        (["record", tmp_path / "new", "--endpoint", "nonsense"], 2, "cannot be connected to"),
        (["replay", path, "--endpoint", "tcp://127.0.0.1:1"], 2, "holds a/0, b/0, b/1; name one with --source"),
        (["replay", path, "--endpoint", "tcp://127.0.0.1:1", "--source", "c/0"], 2, "c/0: not in"),
        (["replay", path, "--endpoint", "nonsense", "--source", "a/0"], 2, "cannot be used"),
        (["show", tmp_path / "nothing"], 2, "does not exist"),
    ]:
        ended = run("events", *arguments)
        assert (ended.returncode, words in ended.stderr) == (code, True), ended.stderr
        assert ended.stderr.count("\n") == 1


def test_the_recordings_own_speed(run: Run, tmp_path: Path) -> None:
    """Four seconds at forty times the speed."""
    path = recording(tmp_path / "events", message("a", 0), message("a", 4))
    command = ["events", "replay", path, "--endpoint", free_endpoint(), "--speed", 40, "--stay", 0]
    begun = time.monotonic()
    assert run(*command).stdout == "2 messages published\n"
    assert time.monotonic() - begun >= 0.1


def test_pauses_that_no_system_makes(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, slept = tmp_path / "events.kv", list[float]()
    with Recorder(file) as recorder:
        for i in range(2):
            recorder.write(Message(1.0 + i, Source("a", 0), b"", i, b""))
    ended = run("events", "replay", file, "--endpoint", free_endpoint(), "--stay", "inf")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("cairn: Invalid value for '--stay'")
    monkeypatch.setattr(time, "sleep", slept.append)
    assert len(list(_paced(Recording(file), 1e-300))) == 2
    assert slept[-1] == 1e9
