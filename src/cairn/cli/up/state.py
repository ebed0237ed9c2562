"""What `cairn up` writes of its children while it runs, and what `cairn status` makes of it."""

import http.client
import json
import os
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from cairn.errors import InputError

_FILE: Final = "state.json"
_ANSWER_S: Final = 2.0


def write_state(home: Path, pid: int, children: Mapping[str, Mapping[str, Any]]) -> None:
    """In one step, so that a reader has all of it."""
    new = home / f"{_FILE}.new"
    new.write_text(json.dumps({"pid": pid, "children": children}), encoding="utf-8")
    new.replace(home / _FILE)


def forget_state(home: Path) -> None:
    (home / _FILE).unlink(missing_ok=True)


def is_running(home: Path) -> bool:
    """Whether a cluster runs there."""
    try:
        return _lives(int(json.loads((home / _FILE).read_text(encoding="utf-8"))["pid"]))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_state(home: Path) -> dict[str, Any]:
    """The children, each with its `state` now: ready, starting or dead. Raises InputError where no cluster runs."""
    if not is_running(home):
        raise InputError(f"no cluster runs in {home}; `cairn up CLUSTER.yaml` starts one, --dir names another place")
    state: dict[str, Any] = json.loads((home / _FILE).read_text(encoding="utf-8"))
    for one in state["children"].values():
        one["state"] = "dead" if not _lives(one["pid"]) else "ready" if answers(one["ready"]) else "starting"
    return state


def answers(url: str | None) -> bool:
    """Whether it answers 200; what has no URL does so by living."""
    if url is None:
        return True
    try:
        with urllib.request.urlopen(url, timeout=_ANSWER_S) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError):
        return False


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
