"""Logs: a failure is logged when it first happens, and only counted from then on."""

import logging
import threading
from collections import Counter

_FORMAT = "%(asctime)s %(levelname)s %(name)s: %(message)s"

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


def setup_logging(level: str) -> None:
    """Lets Cairn's log lines of `level` (DEBUG, INFO, WARNING, ERROR) and above through: to the handlers that the
    program has set up, or to stderr if it has set up none. Every engine calls it; repeatable.
    """
    logger = logging.getLogger("cairn")
    logger.setLevel(level)
    if not logger.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter(_FORMAT))
        logger.addHandler(handler)
