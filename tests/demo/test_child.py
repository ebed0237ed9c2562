"""Children under a deadline: whatever they do, the parent goes on, with one clear line."""

import time

import pytest

from cairn.cli.demo import child as child_module
from cairn.cli.demo.child import Child
from cairn.cli.demo.events import Done, Event, Token
from cairn.errors import CairnError, InputError, StorageError


def play(how: str, silence: float = 60.0) -> list[Event]:
    with Child("tests.demo.puppet", how, what="the puppet", reports=True) as child:
        return list(child.events(silence, lambda: None))


def test_events_come_in_order_even_in_pieces() -> None:
    assert play("well") == [Token("a", 0.5), Done()]


@pytest.mark.parametrize(
    ("how", "kind", "words"),
    [
        ("raises", CairnError, "the puppet died: RuntimeError: the last line .exit code 1."),
        ("killed", CairnError, "the puppet died: killed by signal 9 .9: out of memory"),
        ("garbage", CairnError, "which is no event"),
        ("StorageError", StorageError, "^what it said$"),
        ("InputError", InputError, "^what it said$"),
        ("MemoryError", CairnError, "the puppet failed: MemoryError: what it said"),
        ("logging", CairnError, "the puppet failed: logging: what it said"),
    ],
)
def test_a_failure_is_one_line(how: str, kind: type[CairnError], words: str) -> None:
    with pytest.raises(kind, match=words) as caught:
        play(how)
    assert "\n" not in str(caught.value)


def test_silence_has_an_end() -> None:
    started = time.monotonic()
    with pytest.raises(CairnError, match="nothing for 3 s"):
        play("silent", silence=3.0)
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("how", ["closes", "lingers"])
def test_a_child_that_does_not_end_is_ended(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(child_module, "GRACE_S", 1.0)
    with pytest.raises(CairnError, match="the puppet"):
        play(how)


def test_a_command_that_fails_or_takes_too_long() -> None:
    with Child("no_such_module", what="nothing") as child, pytest.raises(CairnError, match="No module named"):
        child.wait(60, lambda: None)
    ticks: list[None] = []
    with Child("timeit", "-n1", "-r1", "-s", "import time", "time.sleep(600)", what="sleep") as child:
        with pytest.raises(CairnError, match="nothing for 1 s"):
            child.wait(1, lambda: ticks.append(None))
        process = child._process
    assert ticks
    assert process.returncode == -9
