"""What engines and nodes show over HTTP."""

import socket
import urllib.request
from typing import Any

import pytest

from cairn.config.schema import Observe
from cairn.observe import http
from cairn.observe.http import PagesServer


def test_a_request_for_which_there_is_no_thread_takes_nobodys_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: Any) -> None:
        raise RuntimeError("can't start new thread")

    with PagesServer(Observe(http_port=0), {}) as server:
        at = server.url.removeprefix("http://").split(":")
        with monkeypatch.context() as patch:
            patch.setattr(http.ThreadingTCPServer, "process_request", refuses)
            for _ in range(http._AT_ONCE):
                with socket.create_connection((at[0], int(at[1])), 30) as client:
                    assert client.recv(1) == b""
        with urllib.request.urlopen(f"{server.url}/health", timeout=30) as answer:
            assert answer.status == 200
