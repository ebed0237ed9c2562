"""Clients' keys and the admin's, and what may listen where."""

import asyncio

import httpx
import pytest

from cairn.cluster import Keys, MemoryRegistry
from cairn.config import load_config
from cairn.config.schema import Config, Serve
from cairn.errors import ConfigError, InputError
from cairn.plan.schedule import RoundRobin
from cairn.serve.dashboard import PAGE, STATE, Board
from cairn.serve.gateway.admin import Admin
from cairn.serve.gateway.app import Gateway
from cairn.serve.gateway.backends import parse_backend, parse_backends
from cairn.serve.gateway.dispatch import Dispatch
from cairn.serve.gateway.members import Members
from cairn.serve.gateway.metrics import GatewayMetrics
from cairn.serve.gateway.prompts import FleetPrompts
from cairn.serve.gateway.relay import Relay
from cairn.serve.gateway.service import run
from cairn.serve.gateway.shown import ClusterShown
from cairn.serve.indexer.parts import Parts


def test_each_key_opens_its_door() -> None:
    config = Config.model_validate({"serve": {"api_keys": ["one", "two"], "admin_key": "boss"}})
    members = Members(config.serve)
    metrics = GatewayMetrics(members)
    dispatch = Dispatch(members, RoundRobin(), config.serve, metrics.shed.add)
    parts = Parts(config.index)
    relay = Relay(members, dispatch, FleetPrompts(parts), config.serve, metrics)
    board = Board(ClusterShown("x", members, metrics.traffic, lambda: 0, parts.index.held, with_text=True))

    async def main() -> dict[tuple[str, str], int]:
        found = {}
        admin = Admin(members, dispatch, MemoryRegistry(), Keys())
        gateway = Gateway(relay, admin, config.serve, metrics, board)
        async with httpx.AsyncClient(transport=httpx.ASGITransport(gateway), base_url="http://x") as client:
            for key in ("", "one", "two", "boss", "onetwo"):
                headers = {"authorization": f"Bearer {key}"} if key else {}
                for path in ("/health", "/v1/models", "/metrics", "/admin/instances", STATE, PAGE, f"{PAGE}style.css"):
                    found[key, path] = (await client.get(path, headers=headers)).status_code
                answer = await client.post("/v1/completions", headers=headers, content=b"{}")
                found[key, "/v1/completions"] = answer.status_code
        return found

    found = asyncio.run(main())
    parts.close()
    assert {key for (key, path), status in found.items() if path == "/v1/models" and status == 200} == {"one", "two"}
    assert {key for (key, path), status in found.items() if path == "/v1/completions" and status == 503} == {
        "one",
        "two",
    }
    assert {key for (key, path), status in found.items() if path == "/admin/instances" and status == 200} == {"boss"}
    assert {key for (key, path), status in found.items() if path == "/metrics" and status == 200} == {"boss"}
    assert {key for (key, path), status in found.items() if path == STATE and status == 200} == {"boss"}
    anybody = {"/health", PAGE, f"{PAGE}style.css"}
    assert {status for (_, path), status in found.items() if path in anybody} == {200}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"serve.host": "0.0.0.0", "serve.backends": ["http://a"]}, "a token is needed: CAIRN_SERVE__API_KEYS"),
        ({}, "no engines"),
        ({"serve.backends": ["http://a"], "cluster.etcd_addr": "b:1"}, "name one"),
        ({"serve.backends": ["http://a"], "serve.api_keys": [" x"]}, "must be ASCII text without blanks"),
    ],
)
def test_what_cannot_be_served(settings: dict[str, object], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        run(load_config(overrides=settings, environ={}), lambda _: None)


def test_a_backend_in_words() -> None:
    one = parse_backend("a=http://h:1,role=decode,model=m,events=tcp://h:5557,replay=tcp://h:5600,ranks=2")
    assert (one.name, one.http, one.role, one.model) == ("a", "http://h:1", "DECODE", "m")
    assert [(event.endpoint, event.replay, event.rank) for event in one.events] == [
        ("tcp://h:5557", "tcp://h:5600", 0),
        ("tcp://h:5558", "tcp://h:5601", 1),
    ]
    assert parse_backend("http://h:1").name == "h:1"
    for bad in ("a=http://h,role=king", "a=http://h,x=1", "a=http://h,ranks=0", "a=ftp://h", "h:1"):
        with pytest.raises(InputError):
            parse_backend(bad)


def test_two_backends_of_one_name_are_refused() -> None:
    """As two paths of one host are called alike; the registry would let the later one take the name."""
    assert [one.name for one in parse_backends(["a=http://h/x", "b=http://h/y"])] == ["a", "b"]
    with pytest.raises(InputError, match="http://h/x and http://h/y: both are called h; NAME=URL"):
        run(load_config(overrides={"serve.backends": ["http://h/x", "http://h/y"]}, environ={}), lambda _: None)


def test_secrets_are_not_shown() -> None:
    config = Config(serve=Serve.model_validate({"api_keys": ["tell-nobody"], "backend_token": "nor-this"}))
    assert "tell-nobody" not in config.to_yaml() + repr(config)
    assert "nor-this" not in config.to_yaml() + repr(config)
