"""Readiness, as systemd has it (sd_notify(3)): a datagram to the socket that NOTIFY_SOCKET names."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

from cairn.errors import StorageError

_READY = b"READY=1"


def tell_ready() -> None:
    """Tells whoever started this process that it serves; nothing where nobody asked."""
    where = os.environ.get("NOTIFY_SOCKET")
    if not where:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        try:
            sender.sendto(_READY, "\0" + where[1:] if where.startswith("@") else where)
        except OSError:
            return  # whoever asked is gone


def start_in_background(address: str, log: Path, timeout: float) -> int:
    """This very command again with --foreground, in a session of its own, its output in `log`; its process id.

    Returns once it serves. Raises StorageError, with its last line, where it does not.
    """
    log.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    command = [sys.executable, "-c", "from cairn.cli import main; main()", *sys.argv[1:], "--foreground"]
    with (
        tempfile.TemporaryDirectory(prefix="cairn-") as home,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as hears,
    ):
        where = str(Path(home) / "ready")
        hears.bind(where)
        hears.settimeout(0.1)
        with os.fdopen(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "ab") as output:
            begin = output.tell()
            process = subprocess.Popen(
                command,
                env={**os.environ, "NOTIFY_SOCKET": where},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        for _ in range(int(timeout / 0.1)):
            try:
                if hears.recv(64) == _READY:
                    return process.pid
            except TimeoutError:
                if process.poll() is not None:
                    break
        process.kill()
        process.wait()
    said = log.read_bytes()[begin:].decode(errors="replace").strip().splitlines()
    raise StorageError(said[-1].removeprefix("cairn: ") if said else f"node at {address}: did not start; see {log}")
