"""Child processes under a deadline: none is waited for without one, and a failure comes back as one line."""

import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import IO, Self

import msgspec

from cairn import errors
from cairn.cli.demo.events import Done, Event, Failed, decode
from cairn.errors import CairnError

#: How often the screen is told that a silent child still works.
TICK_S = 0.1
#: How long a child that has said goodbye may take to exit.
GRACE_S = 20.0

Tick = Callable[[], None]


class Child:
    """`python -m MODULE *arguments`, with `feed` on its stdin. If `reports`, its last argument is the file descriptor
    of a pipe for events.

    A context manager: on exit the process is gone, killed if it had to be. Not thread-safe.
    """

    def __init__(
        self,
        module: str,
        *arguments: str,
        what: str,
        feed: bytes = b"",
        reports: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.what = what
        self._environment = {**os.environ, **(environment or {})}
        self._errors: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed on exit
        self._pipe: int | None = None
        self._feed: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self._feed.write(feed)
        self._feed.seek(0)
        command = [sys.executable, "-m", module, *arguments]
        if not reports:
            self._process = self._start(command, ())
            return
        self._pipe, child_end = os.pipe()
        try:
            self._process = self._start([*command, str(child_end)], (child_end,))
        finally:
            os.close(child_end)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end(0)
        if self._pipe is not None:
            os.close(self._pipe)
        self._errors.close()
        self._feed.close()

    def wait(self, timeout: float, tick: Tick) -> None:
        """Waits until the child has ended well; raises CairnError if it fails or takes more than `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            try:
                code = self._process.wait(TICK_S)
            except subprocess.TimeoutExpired:
                tick()
                self._check(deadline, timeout)
                continue
            if code:
                raise CairnError(f"{self.what} failed: {self._reason()}")
            return

    def events(self, silence: float, tick: Tick) -> Iterator[Event]:
        """The child's events until Done. Raises what Failed names, or CairnError when the child dies, says something
        else than events, or nothing at all for `silence` seconds."""
        buffer = b""
        deadline = time.monotonic() + silence
        while True:
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                event = self._decode(line)
                yield event
                if isinstance(event, Done):
                    self.wait(GRACE_S, tick)
                    return
                deadline = time.monotonic() + silence
            chunk = self._read(tick)
            if chunk == b"":
                self._end(GRACE_S)
                raise CairnError(f"{self.what} died: {self._reason()}")
            buffer += chunk or b""
            if not chunk:
                self._check(deadline, silence)

    def _start(self, command: Sequence[str], pass_fds: Sequence[int]) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(
            command,
            stdin=self._feed,
            stdout=self._errors,
            stderr=self._errors,
            pass_fds=pass_fds,
            env=self._environment,
        )

    def _end(self, grace: float) -> None:
        """Waits for the process, and kills it if it is still there after `grace` seconds."""
        try:
            self._process.wait(grace)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(GRACE_S)

    def _read(self, tick: Tick) -> bytes | None:
        """What the pipe has; None when it has nothing yet, b"" at its end."""
        assert self._pipe is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._pipe, selectors.EVENT_READ)
            if not selector.select(TICK_S):
                tick()
                return None
        return os.read(self._pipe, 1 << 16)

    def _decode(self, line: bytes) -> Event:
        try:
            event = decode(line)
        except msgspec.DecodeError as error:
            raise CairnError(f"{self.what} reported {line[:80]!r}, which is no event: {error}") from error
        if isinstance(event, Failed):
            kind = getattr(errors, event.kind, None)
            if isinstance(kind, type) and issubclass(kind, CairnError):
                raise kind(event.message)
            raise CairnError(f"{self.what} failed: {event.kind}: {event.message}")
        return event

    def _check(self, deadline: float, timeout: float) -> None:
        if time.monotonic() > deadline:
            raise CairnError(f"{self.what}: nothing for {timeout:.0f} s, given up; is the machine overloaded?")

    def _reason(self) -> str:
        """The exit code, and the last line that the child wrote."""
        self._errors.seek(0, os.SEEK_END)
        self._errors.seek(max(0, self._errors.tell() - 4096))
        lines = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()]
        code = self._process.returncode
        how = f"killed by signal {-code} (9: out of memory?)" if code and code < 0 else f"exit code {code}"
        return f"{lines[-1].strip()} ({how})" if lines else how
