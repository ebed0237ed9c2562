"""Logs: a failure is logged when it first happens, and only counted from then on."""

import itertools
import json
import logging
import re
import secrets
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from typing import Final, Literal

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

#: The id of the request that this thread or task serves; "": none. JSON lines carry it.
REQUEST_ID: Final[ContextVar[str]] = ContextVar("cairn_request_id", default="")

#: By which a request's id comes and goes, as ASGI has it.
REQUEST_HEADER: Final = b"x-request-id"
_READABLE: Final = re.compile(rb"[!-~]{1,128}").fullmatch
_PROCESS: Final = f"{secrets.token_hex(6)}-"
_numbers: Final = itertools.count()

_lock = threading.Lock()
_seen: Counter[tuple[str, str]] = Counter()


def log_once(logger: logging.Logger, key: str, message: str) -> int:
    """Warns the first time `key` is seen by `logger`; returns how often it has been seen, this time included.

    key: what fails and why, from a small set ("disk.read.io_error /var/cache/cairn"), never with a request's or block's
    id: keys are kept as long as the process lives. Thread-safe.
    """
    with _lock:
        _seen[logger.name, key] += 1
        count = _seen[logger.name, key]
    if count == 1:
        logger.warning("%s (further cases are counted, not logged)", message)
    return count


def setup_logging(level: str, form: Literal["text", "json"] = "text") -> None:
    """Lets Cairn's log lines of `level` (DEBUG, INFO, WARNING, ERROR) and above through: to the handlers that the
    program has set up, or to stderr, in this form, if it has set up none. Every engine calls it; repeatable.
    """
    logger = logging.getLogger("cairn")
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(JsonFormatter() if form == "json" else logging.Formatter(_FORMAT))
        logger.addHandler(handler)


def request_id_of(headers: Mapping[bytes, bytes]) -> str:
    """What a client calls its request, if it does in characters for a log; or else a new id."""
    given = headers.get(REQUEST_HEADER)
    return given.decode() if given and _READABLE(given) else f"{_PROCESS}{next(_numbers):x}"


@contextmanager
def serving(request_id: str) -> Iterator[None]:
    """Within it this thread or task serves this request."""
    before = REQUEST_ID.set(request_id)
    try:
        yield
    finally:
        REQUEST_ID.reset(before)


class JsonFormatter(logging.Formatter):
    """A line is one JSON object: time (ISO 8601, UTC), level, logger, message, request_id where there is one, the
    fields that the line was given as `extra={"fields": {...}}`, and the trace of an exception.
    """

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        if request_id := REQUEST_ID.get():
            line["request_id"] = request_id
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)
