"""What a URL means, and what is said of one that means nothing."""

import sys
from importlib.metadata import EntryPoint, EntryPoints
from pathlib import Path
from typing import Any

import pytest

from cairn.config import Config, load_config
from cairn.config.urls import mask_url
from cairn.errors import CairnError, ConfigError
from cairn.tier.remote import open_store, urls
from cairn.tier.remote.files import FileStore
from cairn.tier.remote.valkey import ValkeyStore


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("ftp://host/path", "no store for ftp://; the known ones are az://, file://, gs://, mooncake://, redis://"),
        ("/mnt/kv", "no store for ://; the known ones are"),
        ("file://mnt/kv", "must be file:///absolute/path"),
        ("file:///tmp?fsnyc=true", "unknown option 'fsnyc'; it knows: fsync"),
        ("file:///tmp?fsync=yes", "fsync=yes must be true or false"),
        ("file:///proc/nothing", "must be a directory to write to"),
        ("valkey://host:port", "no URL whose port is a number"),
        ("valkey://[::1", "no URL whose port is a number"),
        ("file:///mnt/kv#1", "# in a path, as %2F %3F %23 %40"),
        ("file:///mnt/%00", "no URL"),
        ("valkey://host/first", "the path must be the number of a database"),
        ("valkeys://host?ca=/nowhere.pem", "ca=/nowhere.pem"),
        ("mooncake://host", "must be mooncake://HOST:PORT?metadata="),
        ("s3://", "storage.remote.url=s3://"),
    ],
)
def test_one_line_says_what_is_wrong(url: str, message: str) -> None:
    with pytest.raises(CairnError) as caught:
        open_store(url)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("host", ["203.0.113.1", "no-such-host.invalid"])
def test_a_host_that_is_not_this_one(host: str) -> None:
    pytest.importorskip("mooncake.store", exc_type=ImportError)
    with pytest.raises(ConfigError, match=f"host={host}: .*; must be an address of this host$"):
        open_store(f"mooncake://127.0.0.1:1?metadata=http://127.0.0.1:2&host={host}")


@pytest.mark.parametrize(
    "url", ["s3://bucket", "valkey://127.0.0.1", "mooncake://127.0.0.1:1?metadata=http://127.0.0.1:2"]
)
def test_limits_that_a_store_cannot_keep_are_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="capacity"):
        open_store(url, capacity_bytes=1 << 30)


def test_what_a_url_opens(tmp_path: Path) -> None:
    files, valkey = (
        open_store(f"file://{tmp_path}/a%20b?fsync=true"),
        open_store("rediss://u:p%40w@host:1/3?cluster=true"),
    )
    try:
        assert isinstance(files, FileStore)
        assert (tmp_path / "a b").is_dir()
        assert isinstance(valkey, ValkeyStore)
        login = valkey._servers._login
        assert (login.user, login.password, login.database, login.tls is not None) == ("u", "p@w", 3, True)
    finally:
        files.close()
        valkey.close()


def test_third_parties_add_stores_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def make(url: urls.StoreUrl) -> FileStore:
        return FileStore(tmp_path / url.parts.netloc)

    module: Any = type(sys)("third_party")
    module.make = make
    monkeypatch.setitem(sys.modules, "third_party", module)
    entry = EntryPoint("ours", "third_party:make", "cairn.stores")
    monkeypatch.setattr(urls, "entry_points", lambda group: EntryPoints([entry] if group == "cairn.stores" else []))
    store = open_store("ours://shelf")
    store.close()
    assert (tmp_path / "shelf").is_dir()
    with pytest.raises(ConfigError, match="ours://, redis://"):
        open_store("nobodys://shelf")


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("valkey://user:secret@host:6379/0", "valkey://user:***@host:6379/0"),
        ("s3://KEY:SE/CRET@bucket", "s3://KEY:***@bucket"),  # no URL: the key must be quoted
        ("s3://KEY:SE@CR/ET@bucket/a?endpoint=http://h:1", "s3://KEY:***@bucket/a?endpoint=http://h:1"),
        ("valkey://:12/secret@host", "valkey://:***@host"),
        ("valkey://user:sec#ret?@host", "valkey://user:***@host"),
        ("--storage.remote.url=redis://:secret@host", "--storage.remote.url=redis://:***@host"),
        ("s3://bucket/a:b@c", "s3://bucket/a:b@c"),
        ("valkey://user@host:1/0", "valkey://user@host:1/0"),
        ("redis://:secret@host", "redis://:***@host"),
        ("file:///mnt/kv", "file:///mnt/kv"),
        ("valkey://[::1", "valkey://***"),
        ("plain", "plain"),
    ],
)
def test_passwords_are_not_shown(url: str, shown: str) -> None:
    assert mask_url(url) == shown


def test_a_configuration_for_people_has_no_password_and_one_for_machines_has() -> None:
    config = load_config(environ={"CAIRN_STORAGE__REMOTE__URL": "valkey://:hush@host"})
    assert "hush" not in config.to_yaml() + config.model_dump_json(context="masked")
    assert Config.model_validate(config.model_dump(mode="json")) == config


def test_passwords_are_in_no_message() -> None:
    for url in (
        "valkey://:secret@host/first",
        "nobodys://:secret@host",
        "valkey://:secret@host?nothing=1",
        "valkey://:secret/two@host",
        "valkey://user:1#secret@host",
        "s3://KEY:12/secret@bucket",
        "s3://KEY:secret/two@bucket",
    ):
        with pytest.raises(ConfigError) as caught:
            open_store(url)
        assert "secret" not in str(caught.value)
