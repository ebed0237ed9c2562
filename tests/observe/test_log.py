"""What reaches the log, and how often."""

import io
import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import pytest

from cairn.observe.log import log_once, serving, setup_logging


@contextmanager
def bare_logging() -> Iterator[logging.Logger]:
    """The `cairn` logger as in a program that has set up nothing (pytest has); put back afterwards."""
    root, logger = logging.getLogger(), logging.getLogger("cairn")
    kept = root.handlers[:], logger.handlers[:], logger.level
    root.handlers, logger.handlers = [], []
    try:
        yield logger
    finally:
        root.handlers, logger.handlers = kept[0], kept[1]
        logger.setLevel(kept[2])


def test_a_failure_is_logged_once_and_counted_on(caplog: pytest.LogCaptureFixture) -> None:
    logger = logging.getLogger("cairn.test.once")
    counts = [log_once(logger, "disk.read /a", "disk: read failed") for _ in range(3)]
    assert counts == [1, 2, 3]
    assert [record.getMessage() for record in caplog.records] == [
        "disk: read failed (further cases are counted, not logged)"
    ]


def test_other_keys_and_loggers_are_told_apart(caplog: pytest.LogCaptureFixture) -> None:
    for name, key in (("cairn.test.a", "x"), ("cairn.test.a", "y"), ("cairn.test.b", "x")):
        assert log_once(logging.getLogger(name), key, f"{name} {key} 100%") == 1
    assert len(caplog.records) == 3


def test_setup_writes_to_stderr_once_and_from_the_level_on(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with bare_logging():
        setup_logging("WARNING")
        setup_logging("ERROR")
        logging.getLogger("cairn.test").warning("not this")
        logging.getLogger("cairn.test").error("this")
    assert stderr.getvalue().count("\n") == 1
    assert stderr.getvalue().endswith("ERROR cairn.test: this\n")


def test_setup_leaves_a_programs_own_handlers_alone() -> None:
    with bare_logging() as logger:
        logging.getLogger().addHandler(logging.NullHandler())
        setup_logging("INFO")
        assert logger.handlers == []
        assert logger.level == logging.INFO


def test_a_json_line_carries_the_request_it_is_about(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    with bare_logging():
        setup_logging("INFO", "json")
        logger = logging.getLogger("cairn.test")
        logger.info("outside")
        with serving("r-1"):
            logger.info('a "quoted"\nline', extra={"fields": {"status": 200}})
            with serving("r-2"):
                try:
                    raise ValueError("no")
                except ValueError:
                    logger.exception("inside")
            log_once(logger, "json", "once")
    outside, quoted, inside, once = map(json.loads, stderr.getvalue().splitlines())
    assert outside.keys() == {"time", "level", "logger", "message"}
    assert quoted["message"] == 'a "quoted"\nline'
    assert (quoted["level"], quoted["logger"], quoted["status"]) == ("INFO", "cairn.test", 200)
    assert [line["request_id"] for line in (quoted, inside, once)] == ["r-1", "r-2", "r-1"]
    assert inside["exception"].endswith("ValueError: no")
    assert datetime.fromisoformat(quoted["time"]).tzinfo is not None
