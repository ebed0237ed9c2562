"""Starts processes one after the other, starts those anew that die, and ends all of them in order."""

import contextlib
import ctypes
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cairn.cli.up.plan import SERVICE, Child
from cairn.cli.up.state import answers, forget_state, is_running, write_state
from cairn.errors import InputError, StorageError

_LOOK_S: Final = 0.2
_END_S: Final = 20.0
#: Seconds before one that died is started anew: doubled from the first up to the last while it goes on dying.
_FIRST_PAUSE_S: Final = 0.5
_LAST_PAUSE_S: Final = 30.0
#: One that has lived so long is not said to go on dying, seconds.
_HEALTHY_S: Final = 60.0
_PR_SET_PDEATHSIG: Final = 1


class _Running:
    """One child, in its present life."""

    def __init__(self, child: Child, home: Path) -> None:
        self.child, self.log = child, home / f"{child.name}.log"
        self.pause_s, self.restart_at = _FIRST_PAUSE_S, 0.0
        self.start()

    def start(self) -> None:
        self.began = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.child.command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | dict(self.child.environ),
                start_new_session=True,
                preexec_fn=_die_with_parent,
            )

    def signal(self, number: int) -> None:
        """To all its processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def last_words(self) -> str:
        lines = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1][:300] if lines else "it said nothing"


class Supervisor:
    """From a process's main thread: `run` until SIGINT or SIGTERM."""

    def __init__(self, children: Sequence[Child], home: Path, say: Callable[[str], None]) -> None:
        self._children, self._home, self._say = children, home, say
        self._running: list[_Running] = []
        self._ended = threading.Event()

    def run(self) -> int:
        """The exit code. Raises InputError if a cluster runs there, StorageError if a child does not start; nothing is
        left running then.
        """
        if is_running(self._home):
            raise InputError(f"a cluster runs in {self._home} already; end it, or name another place with --dir")
        before = {number: signal.signal(number, self._end) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for child in self._children:
                if not self._start(child):
                    return 0
            url = next(child.url for child in self._children if child.name == SERVICE)
            self._say(f"ready: {url}; dashboard: {url}/dashboard/; logs in {self._home}; Ctrl-C ends it")
            while not self._ended.wait(_LOOK_S):
                for one in self._running:
                    self._look_after(one)
        finally:
            self._stop()
            for number, handler in before.items():
                signal.signal(number, handler)
        return 0

    def _end(self, *_: object) -> None:
        self._ended.set()

    def _start(self, child: Child) -> bool:
        """False: it is to end."""
        try:
            one = _Running(child, self._home)
        except OSError as error:
            raise StorageError(f"{child.name}: {child.command[0]} cannot be run: {error.strerror or error}") from None
        self._running.append(one)
        self._write()
        deadline = time.monotonic() + child.start_s
        while not self._ended.is_set():
            if one.process.poll() is not None:
                raise StorageError(f"{child.name} has ended at once: {one.last_words()} ({one.log})")
            if answers(child.ready):
                self._say(f"{child.name}: {child.url or 'runs'}")
                return True
            if time.monotonic() > deadline:
                raise StorageError(f"{child.name}: not ready in {child.start_s:g} s: {one.last_words()} ({one.log})")
            self._ended.wait(_LOOK_S)
        return False

    def _look_after(self, one: _Running) -> None:
        code, now = one.process.poll(), time.monotonic()
        if code is None:
            return
        if not one.restart_at:
            one.pause_s = _FIRST_PAUSE_S if now - one.began > _HEALTHY_S else one.pause_s
            one.restart_at, pause_s = now + one.pause_s, one.pause_s
            one.pause_s = min(2 * one.pause_s, _LAST_PAUSE_S)
            self._say(f"{one.child.name}: ended with {code}; starts anew in {pause_s:g} s ({one.log})")
        elif now >= one.restart_at:
            one.restart_at = 0.0
            one.signal(signal.SIGKILL)  # what it has left behind
            one.start()
            self._write()

    def _stop(self) -> None:
        """Those that were started last end first, each in its time."""
        for one in reversed(self._running):
            if one.process.poll() is None:
                one.process.terminate()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    one.process.wait(_END_S)
            one.signal(signal.SIGKILL)
            one.process.wait()
        forget_state(self._home)

    def _write(self) -> None:
        children: dict[str, dict[str, Any]] = {
            one.child.name: {
                "pid": one.process.pid,
                "url": one.child.url,
                "ready": one.child.ready,
                "log": str(one.log),
            }
            for one in self._running
        }
        write_state(self._home, os.getpid(), children)


def _die_with_parent() -> None:
    """In the child, before it becomes another program: should `cairn up` be killed, it ends too (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
