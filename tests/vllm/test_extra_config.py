"""`kv_connector_extra_config`: how settings may be written, and what is said about those that are wrong."""

from pathlib import Path
from typing import Any

import pytest

from cairn.connect.vllm.extra_config import FLAGS, config_of
from cairn.errors import ConfigError


def complaint(extra: dict[str, Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        config_of(extra)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "extra",
    [
        {"enable_cache_upload": False},
        {"engine.enable_cache_upload": False},
        {"engine": {"enable_cache_upload": False}},
    ],
)
def test_a_flag_stands_bare_dotted_or_nested(extra: dict[str, Any]) -> None:
    config = config_of(extra | {"storage.cpu.size": "64MiB", "enable_service_routing": True})
    assert not config.engine.enable_cache_upload
    assert config.engine.enable_service_routing
    assert config.storage.cpu.size == 64 << 20


def test_a_flag_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "cairn.yaml"
    path.write_text("engine: {enable_service_routing: true, timeout_s: 7}\nstorage: {cpu: {size: 32MiB}}\n")
    assert config_of({"config": str(path)}).engine.enable_service_routing
    config = config_of({"config": str(path), "enable_service_routing": False})
    assert not config.engine.enable_service_routing
    assert (config.engine.timeout_s, config.storage.cpu.size) == (7, 32 << 20)


def test_what_was_handed_over_stays_as_it_was() -> None:
    extra = {"enable_service_routing": True, "engine": {"planner": False}}
    before = {"enable_service_routing": True, "engine": {"planner": False}}
    config = config_of(extra)
    assert config.engine.enable_service_routing
    assert not config.engine.planner
    assert extra == before


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("enable_service_rooting", "engine.enable_service_routing"),
        ("enable_disag_pd", "engine.enable_disagg_pd"),
        ("storage.cpu.sise", "storage.cpu.size"),
    ],
)
def test_an_unknown_key_names_the_nearest(key: str, nearest: str) -> None:
    assert complaint({key: True}) == f"{key}: unknown key; did you mean {nearest}?"


@pytest.mark.parametrize("extra", [{"engine.enable_cache_upload": True}, {"engine": {"enable_cache_upload": True}}])
def test_a_flag_that_stands_twice_is_an_error(extra: dict[str, Any]) -> None:
    message = complaint({"enable_cache_upload": True} | extra)
    assert message == "enable_cache_upload and engine.enable_cache_upload: must stand once; take one out"


@pytest.mark.parametrize("key", ["enable_disagg_pd", "engine.enable_disagg_pd"])
def test_disaggregation_needs_what_instances_share(key: str) -> None:
    assert "set node.address or storage.remote.url" in complaint({key: True})
    assert config_of({key: True, "node.address": "ipc:///run/node.sock"}).engine.enable_disagg_pd
    assert config_of({key: True, "storage.remote.url": "file:///mnt/kv"}).engine.enable_disagg_pd
    assert not config_of({key: False}).engine.enable_disagg_pd


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_is_a_truth_value(flag: str) -> None:
    assert complaint({flag: "perhaps"}).startswith(f"engine.{flag}='perhaps': must be a valid boolean")
