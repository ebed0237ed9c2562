"""The service as a process: who may ask, how it ends, what it says when it cannot begin."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import pytest

from cairn.cli import main
from cairn.serve.proto.indexer_pb2 import GetPodScoresRequest
from cairn.serve.proto.indexer_pb2_grpc import IndexerServiceStub
from tests.serve.running import DEADLINE_S, RUN, Service

SECRET = "correct-horse-battery"


@pytest.fixture(scope="module")
def guarded(tiny: Path) -> Iterator[Service]:
    options = ("--host", "0.0.0.0", "--model", f"tiny={tiny}", "--set", "index.log_level=DEBUG")
    with Service(*options, CAIRN_INDEX__TOKEN=SECRET) as service:
        yield service


def test_only_with_the_token(guarded: Service) -> None:
    host, _, port = guarded.http.rpartition(":")
    base = f"http://127.0.0.1:{port}"
    assert host == "0.0.0.0"
    assert httpx.get(f"{base}/health").status_code == 200
    assert httpx.get(f"{base}/health/ready").status_code == 200
    for given in (None, "Bearer wrong", f"Basic {SECRET}", SECRET, f"Bearer {SECRET}x", "Bearer", "Bearer \xfc"):
        for path in ("/score", "/instances", "/metrics", "/openapi.json", "/docs", "/nothing"):
            headers = {} if given is None else {"authorization": given.encode("latin-1")}
            answer = httpx.get(f"{base}{path}", headers=headers)
            assert answer.status_code == 401, (given, path)
            assert answer.headers["www-authenticate"] == "Bearer"
            assert "a bearer token is needed" in answer.json()["error"]["message"]
    good = {"authorization": f"Bearer {SECRET}"}
    assert httpx.post(f"{base}/score", json={"token_ids": [1]}, headers=good).status_code == 200
    assert httpx.get(f"{base}/metrics", headers=good).status_code == 200
    tree = httpx.get(f"{base}/openapi.json", headers=good).json()
    assert tree["paths"]["/score"]["post"]["security"] == [{"bearer": []}]
    assert tree["paths"]["/health"]["get"]["security"] == []


def test_only_with_the_token_over_grpc(guarded: Service) -> None:
    request = GetPodScoresRequest(prompt="x", model_name="tiny")
    with grpc.insecure_channel(f"127.0.0.1:{guarded.rpc.rpartition(':')[2]}") as channel:
        ask = IndexerServiceStub(channel).GetPodScores
        for given in ((), (("authorization", "Bearer wrong"),)):
            with pytest.raises(grpc.RpcError) as caught:
                ask(request, metadata=given, timeout=30)
            assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED
        assert list(ask(request, metadata=(("authorization", f"Bearer {SECRET}"),), timeout=30).scores) == []


def test_the_token_is_nowhere_in_what_is_printed(guarded: Service) -> None:
    """Runs last of those that use it: it ends the service to read all of its output."""
    assert guarded.end() == 0
    assert guarded.process.stdout is not None
    assert SECRET not in "".join(guarded.lines) + guarded.process.stdout.read()


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_when_told(by: signal.Signals) -> None:
    with Service("--no-rpc") as service:
        assert service.rpc == ""
        assert service.client.get("/health").status_code == 200  # this connection stays open
        begun = time.monotonic()
        assert service.end(by) == 0
        assert time.monotonic() - begun < 5
        with pytest.raises(httpx.TransportError):
            service.client.get("/health")


def test_it_ends_within_its_time_whatever_goes_on(tiny: Path) -> None:
    """A template that never comes to an end holds a thread that nobody can stop."""
    endless = "{% for i in range(99999) %}" * 3 + "{% endfor %}" * 3
    options = ("--set", "index.request_chat_template=true", "--set", "index.shutdown_s=2", "--set", "index.request_s=1")
    with Service("--no-rpc", "--model", f"tiny={tiny}", *options) as service:
        fields = {"messages": [{"role": "user", "content": "x"}], "chat_template": endless}
        answer = service.client.post("/score_chat_completions", json=fields)
        assert answer.status_code == 504, answer.text
        assert "not done after 1 s" in answer.json()["error"]["message"]
        begun = time.monotonic()
        assert service.end() == 1
        assert time.monotonic() - begun < 10


def refused(*options: str, **environ: str) -> tuple[int, str]:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("CAIRN_")}
    command = [sys.executable, "-c", RUN, "index", *options]
    ended = subprocess.run(
        command, env=clean | environ, capture_output=True, text=True, timeout=DEADLINE_S, check=False
    )
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.returncode, ended.stderr


def test_ports_that_are_taken() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, words in (
            (("--http-port", port), f"HTTP on 127.0.0.1:{port}: Address already in use; name another with --http-port"),
            (("--http-port", "0", "--rpc-port", port), f"gRPC on 127.0.0.1:{port}: in use"),
            (
                ("--http-port", "0", "--no-rpc", "--instance", f"a=tcp://127.0.0.1:{port},bind"),
                f"tcp://127.0.0.1:{port}: cannot be bound: Address already in use",
            ),
            (("--http-port", "0", "--no-rpc", "--instance", "nonsense"), "instance 'nonsense': must be NAME=ENDPOINT"),
        ):
            code, line = refused(*options)
            assert (code, words in line) == (2, True), line


def test_what_it_cannot_begin_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(*options: str, **environ: str) -> tuple[int, str]:
        """In this process: it does not come as far as to listen."""
        monkeypatch.setattr(sys, "argv", ["cairn", "index", *options])
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), capsys.readouterr().err

    secret = tmp_path / "token"
    secret.write_text("")
    for options, words in (
        (("--host", "0.0.0.0"), "host=0.0.0.0: is not loopback, so a token is needed"),
        (("--host", "0.0.0.0", "--token-file", str(secret)), "token: must be ASCII text"),
        (("--model", "nonsense"), "--model 'nonsense': must be NAME=PATH"),
        (("--http-port", "70000"), "index.http_port=70000: must be less than or equal to 65535"),
    ):
        code, line = refused(*options)
        assert (code, words in line) == (2, True), line
    code, line = refused(CAIRN_INDEX__TOKEN="12345")
    assert (code, "12345" in line, "put it in quotes" in line) == (2, False, True), line
