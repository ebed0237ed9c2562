"""LMCache's configuration becomes one that Cairn takes, and nothing of it is lost without a word."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from cairn.cli.lmcache import Imported, import_lmcache, read_lmcache, render
from cairn.config import load_config
from cairn.errors import ConfigError, InputError

Run = Callable[..., subprocess.CompletedProcess[str]]

#: As LMCache's documentation has them.
FILE = """
chunk_size: 256
local_cpu: true
max_local_cpu_size: 20
local_disk: "file:///var/cache/lm/"
max_local_disk_size: 100
remote_url: "redis://user:s3cret@10.0.0.5:6379"
remote_serde: "cachegen"
cache_policy: FIFO
pin_timeout_sec: 300
extra_config: {aws_secret: s3cret}
"""


def became(imported: Imported) -> dict[str, str]:
    return {one.name: one.target for one in imported.settings}


def test_a_file_becomes_a_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables win, as they do in LMCache."""
    theirs, ours = tmp_path / "lmcache.yaml", tmp_path / "cairn.yaml"
    theirs.write_text(FILE)
    monkeypatch.setenv("LMCACHE_CONFIG_FILE", str(theirs))
    monkeypatch.setenv("LMCACHE_MAX_LOCAL_CPU_SIZE", "2.5")
    monkeypatch.setenv("LMCACHE_LOOKUP_TIMEOUT_MS", "500")
    monkeypatch.setenv("LMCACHE_USE_EXPERIMENTAL", "True")
    ended = run("config", "import-lmcache")
    assert (ended.returncode, ended.stderr) == (0, "")
    ours.write_text(ended.stdout)
    config = load_config(ours, environ={})
    assert config.storage.cpu.size == 5 << 29
    assert (str(config.storage.disk.path), config.storage.disk.size) == ("/var/cache/lm", 100 << 30)
    assert config.storage.remote.url == "redis://user:s3cret@10.0.0.5:6379"
    assert config.storage.remote.lookup_timeout_s == 0.5
    assert config.compression.algorithm == "cachegen"
    assert config.storage.cpu.policy == "s3fifo"
    assert config.engine.lease_s == 300
    assert "# chunk_size: 256 has no counterpart: " in ended.stdout
    comments = ended.stdout.partition("# From")[2]
    assert "s3cret" not in comments
    assert "# max_local_cpu_size: 2.5 -> storage.cpu.size\n" in comments


def test_machines_get_the_same_in_json(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lmcache.yaml").write_text(FILE)
    shown = json.loads(run("config", "import-lmcache", tmp_path / "lmcache.yaml", "--json").stdout)
    assert shown["config"]["storage.cpu.size"] == "20GiB"
    assert {one["name"] for one in shown["settings"]} == {*yaml.safe_load(FILE)}


@pytest.mark.parametrize(
    ("url", "extra", "ours"),
    [
        ("redis://10.0.0.5:6379", {}, "redis://10.0.0.5:6379"),
        ("valkey://10.0.0.5:6379", {}, "valkey://10.0.0.5:6379"),
        ("fs://host:0/mnt/shared", {}, "file:///mnt/shared"),
        ("s3://kv.s3.eu-west-1.amazonaws.com", {}, "s3://kv?region=eu-west-1"),
        ("s3://kv", {"s3_region": "us-east-2"}, "s3://kv?region=us-east-2"),
        (
            "mooncakestore://10.0.0.5:50051/",
            {"metadata_server": "http://10.0.0.5:8080/metadata", "protocol": "rdma", "device_name": "mlx5_0"},
            "mooncake://10.0.0.5:50051?metadata=http://10.0.0.5:8080/metadata&protocol=rdma&device=mlx5_0",
        ),
        ("mooncakestore://10.0.0.5:50051/", {}, None),
        ("lm://10.0.0.5:65432", {}, None),
        (None, {}, None),
        ("infinistore://10.0.0.5:12345", {}, None),
    ],
)
def test_stores(url: str | None, extra: dict[str, str], ours: str | None) -> None:
    imported = import_lmcache({"remote_url": url, "extra_config": extra})
    assert imported.config.get("storage.remote.url") == ours
    assert became(imported)["remote_url"] == ("storage.remote.url" if ours else "")


def test_what_lmcache_takes_for_granted_is_told() -> None:
    imported = import_lmcache({"local_disk": "/mnt/a"})
    assert imported.config == {"storage.cpu.size": "5GiB"}  # its default; and a disk of no size keeps nothing
    assert became(imported) == {"max_local_cpu_size": "storage.cpu.size", "local_disk": ""}


def test_a_deadline_may_not_outlive_the_lease() -> None:
    assert import_lmcache({"blocking_timeout_secs": 90, "pin_timeout_sec": 60}).config["engine.lease_s"] == 90


@pytest.mark.parametrize(
    "values", [{"max_local_cpu_size": "lots"}, {"max_local_cpu_size": "1e999"}, {"blocking_timeout_secs": [1]}]
)
def test_what_lmcache_would_not_take(values: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="no value that LMCache takes"):
        import_lmcache(values)


def test_what_cairn_would_not_take() -> None:
    with pytest.raises(ConfigError, match=r"engine\.timeout_s"):
        import_lmcache({"blocking_timeout_secs": 0})


def test_a_file_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "list.yaml").write_text("[1]")
    for path in (tmp_path / "list.yaml", tmp_path / "none.yaml"):
        with pytest.raises(InputError, match=str(path)):
            read_lmcache(path, {})


@pytest.mark.parametrize("text", ["a: !!int ''", "a: !!timestamp x", "[" * 5000])
def test_a_file_that_looks_like_one(tmp_path: Path, text: str) -> None:
    (tmp_path / "lmcache.yaml").write_text(text)
    with pytest.raises(InputError, match="cannot be read"):
        read_lmcache(tmp_path / "lmcache.yaml", {})


def test_names_that_yaml_takes_for_dates(run: Run, tmp_path: Path) -> None:
    (tmp_path / "lmcache.yaml").write_text("extra_config: {2024-01-01: {2024-01-02: 3}}\nmine: [{2024-01-03: 4}]")
    told = run("config", "import-lmcache", tmp_path / "lmcache.yaml")
    assert (told.returncode, told.stderr) == (0, "")
    assert '# mine: [{"2024-01-03": 4}] has no counterpart' in told.stdout
    shown = json.loads(run("config", "import-lmcache", tmp_path / "lmcache.yaml", "--json").stdout)
    assert {one["name"]: one["value"] for one in shown["settings"]}["extra_config"] == {"2024-01-01": {"2024-01-02": 3}}


def test_a_file_that_holds_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lmcache.yaml").write_text("mine: &a [1, *a]")
    with pytest.raises(InputError, match="cannot be read"):
        read_lmcache(tmp_path / "lmcache.yaml", {})


texts = st.text(st.characters(codec="utf-8"), max_size=20)


@given(st.dictionaries(texts, st.none() | st.booleans() | st.integers() | texts, max_size=5))
def test_nothing_is_lost_and_nothing_breaks_the_file(values: dict[str, Any]) -> None:
    """Whatever names and values: each is told of, and what is written is a configuration."""
    values = {f"x{name}": value for name, value in values.items()}
    imported = import_lmcache(values)
    assert became(imported).keys() == {"max_local_cpu_size", *values}
    assert yaml.safe_load(render(imported)) == {"storage": {"cpu": {"size": "5GiB"}}}
