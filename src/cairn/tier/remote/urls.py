"""Which store a URL means. Third parties add one by the entry point `cairn.stores`: its name is the scheme, its object
takes (url: StoreUrl) and returns an `ObjectStore`.
"""

import contextlib
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from cairn.config.sizes import parse_size
from cairn.config.urls import mask_url
from cairn.errors import ConfigError
from cairn.tier.remote.base import ObjectStore


class StoreUrl(NamedTuple):
    """A store's URL, and taken apart. options: its query. ttl_s, capacity_bytes: the settings of these names.

    `str` leaves the password out.
    """

    text: str
    parts: SplitResult
    options: dict[str, str]
    ttl_s: float | None
    capacity_bytes: int | None

    def __str__(self) -> str:
        return mask_url(self.text)

    def check(self, *known: str) -> None:
        """Raises ConfigError for an option that is none of these."""
        for name in self.options:
            if name not in known:
                known_text = ", ".join(known) or "none"
                raise ConfigError(f"storage.remote.url={self}: unknown option {name!r}; it knows: {known_text}")

    def flag(self, name: str) -> bool:
        """An option that is true or false. Raises ConfigError."""
        text = self.options.get(name, "false").lower()
        if text not in ("true", "false"):
            raise ConfigError(f"storage.remote.url={self}: {name}={text} must be true or false")
        return text == "true"


def open_store(url: str, *, ttl_s: float | None = None, capacity_bytes: int | None = None) -> ObjectStore:
    """The store that a URL means. Raises ConfigError for a URL that says nothing, or a package that is missing.

    ttl_s: objects not used for so long go; capacity_bytes: what all may take together. A store that cannot do one of
    these by itself refuses it.
    """
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - says whether it is a number
        cut = ":" in parts.netloc and "@" not in parts.netloc and "@" in parts.path  # in a password, by its slash
        sound = not cut and not parts.fragment and "\0" not in unquote(url)
    except ValueError:  # whose text may have a part of the password
        sound = False
    if not sound:
        raise ConfigError(
            f"storage.remote.url={mask_url(url)}: no URL whose port is a number; "
            "write / ? # @ in a password, and # in a path, as %2F %3F %23 %40"
        )
    wanted = StoreUrl(url, parts, dict(parse_qsl(parts.query, keep_blank_values=True)), ttl_s, capacity_bytes)
    opener = _OPENERS.get(parts.scheme)
    if opener is None:
        added = {entry.name: entry for entry in entry_points(group="cairn.stores")}
        if parts.scheme not in added:
            known = ", ".join(f"{scheme}://" for scheme in sorted({*_OPENERS, *added}))
            raise ConfigError(
                f"storage.remote.url={wanted}: no store for {parts.scheme}://; the known ones are {known}"
            )
        opener = added[parts.scheme].load()
    return opener(wanted)


def _files(url: StoreUrl) -> ObjectStore:
    from cairn.tier.remote.files import FileStore

    url.check("fsync")
    if url.parts.netloc or not url.parts.path:
        raise ConfigError(f"storage.remote.url={url}: must be file:///absolute/path")
    return FileStore(
        Path(unquote(url.parts.path)), fsync=url.flag("fsync"), capacity_bytes=url.capacity_bytes, ttl_s=url.ttl_s
    )


def _valkey(url: StoreUrl) -> ObjectStore:
    import ssl

    from cairn.tier.remote.valkey import Login, ValkeyStore

    url.check("cluster", "ca")
    if url.capacity_bytes is not None:
        raise ConfigError(f"storage.remote.capacity with {url}: set the server's maxmemory instead, and take it out")
    tls = None
    if url.parts.scheme in ("valkeys", "rediss"):
        try:
            tls = ssl.create_default_context(cafile=url.options.get("ca"))
        except OSError as error:
            raise ConfigError(f"storage.remote.url={url}: ca={url.options.get('ca')}: {error}") from None
    database = 0
    if url.parts.path.strip("/"):
        with contextlib.suppress(ValueError):
            database = int(url.parts.path.strip("/"))
        if str(database) != url.parts.path.strip("/"):
            raise ConfigError(f"storage.remote.url={url}: the path must be the number of a database")
    login = Login(unquote(url.parts.username or ""), unquote(url.parts.password or ""), database, tls)
    address = (url.parts.hostname or "127.0.0.1", url.parts.port or 6379)
    return ValkeyStore(address, login=login, cluster=url.flag("cluster"), ttl_s=url.ttl_s)


def _obstore(url: StoreUrl) -> ObjectStore:
    """Settings that the URL lacks (keys, region) come from the provider's usual environment variables."""
    url.check("endpoint", "region", "ca")
    if url.ttl_s is not None or url.capacity_bytes is not None:
        raise ConfigError(f"storage.remote.ttl_s or capacity with {url}: set a lifecycle rule of the bucket's instead")
    try:
        from obstore.exceptions import BaseError
        from obstore.store import from_url

        from cairn.tier.remote.s3 import ObstoreStore
    except ImportError:
        raise ConfigError(f"storage.remote.url={url}: needs the package obstore: pip install 'cairn-kv[s3]'") from None
    endpoint = url.options.get("endpoint", "")
    settings = dict(url.options)
    ca = settings.pop("ca", None)
    if url.parts.username:
        settings |= {
            "access_key_id": unquote(url.parts.username),
            "secret_access_key": unquote(url.parts.password or ""),
        }
    if endpoint and "region" not in settings:
        settings["region"] = "us-east-1"
    address = f"{url.parts.scheme}://{url.parts.hostname or ''}{url.parts.path}"
    client = {"allow_http": endpoint.startswith("http://"), "connect_timeout": "2s", "timeout": "60s"}
    try:
        if ca is not None:
            client["root_certificate"] = Path(ca).read_text()
        # No retries: the tier's breaker decides when to try again.
        store = from_url(address, client_options=client, retry_config={"max_retries": 0}, **settings)  # type: ignore[call-overload]
    except (BaseError, OSError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"storage.remote.url={url}: {reason}") from None
    return ObstoreStore(store, str(url))


def _mooncake(url: StoreUrl) -> ObjectStore:
    import os
    import socket

    from cairn.tier.remote.mooncake import Cluster, MooncakeStore

    url.check("metadata", "host", "protocol", "device", "segment")
    if url.ttl_s is not None or url.capacity_bytes is not None:
        raise ConfigError(f"storage.remote.ttl_s or capacity with {url}: the cluster's master decides; take them out")
    if not url.parts.hostname or not url.parts.port or not url.options.get("metadata"):
        raise ConfigError(
            f"storage.remote.url={url}: must be mooncake://HOST:PORT?metadata=http://HOST:PORT/metadata of the master"
        )
    try:
        for variable, value in (("GLOG_minloglevel", "2"), ("MC_LOG_LEVEL", "ERROR")):
            os.environ.setdefault(variable, value)  # or it tells about every call on stderr
        from mooncake.store import MooncakeDistributedStore
    except ImportError as error:
        raise ConfigError(
            f"storage.remote.url={url}: needs mooncake-transfer-engine (or -non-cuda) and libibverbs1: {error}"
        ) from None
    host = url.options.get("host")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect((url.parts.hostname, url.parts.port))  # sends nothing, but tells which address leads there
        host = host or str(probe.getsockname()[0])
    if host and ":" not in host:
        try:
            with socket.socket() as probe:
                probe.bind((host, 0))
                host = f"{host}:{probe.getsockname()[1]}"
        except OSError as error:
            raise ConfigError(
                f"storage.remote.url={url}: host={host}: {error.strerror or error}; must be an address of this host"
            ) from None
    try:
        segment = parse_size(url.options.get("segment", 0))
    except ValueError as error:
        raise ConfigError(f"storage.remote.url={url}: segment {error}") from None
    cluster = Cluster(
        f"{url.parts.hostname}:{url.parts.port}",
        url.options["metadata"],
        host or "127.0.0.1",
        url.options.get("protocol", "tcp"),
        url.options.get("device", ""),
        segment,
    )
    return MooncakeStore(cluster, MooncakeDistributedStore)


_OPENERS: Final[dict[str, Callable[[StoreUrl], ObjectStore]]] = {
    "file": _files,
    "mooncake": _mooncake,
    **dict.fromkeys(("s3", "gs", "az"), _obstore),
    **dict.fromkeys(("valkey", "valkeys", "redis", "rediss"), _valkey),
}
