"""The bare clients that `cairn bench remote` measures against: the usual library of each store, as one would use it."""

import contextlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

import numpy as np
import xxhash

from cairn.errors import InputError, StorageError


class BareClient(ABC):
    """Objects by name, moved by a pool of threads; a quarter of them store, as in the tier.

    lands: the client itself puts what it loads where it is told to; others give bytes of their own.
    """

    lands = False

    def __init__(self, threads: int) -> None:
        self._readers = ThreadPoolExecutor(threads)
        self._writers = ThreadPoolExecutor(max(1, threads // 4))

    def put(self, objects: Sequence[tuple[str, bytes]]) -> None:
        list(self._writers.map(lambda pair: self.put_one(*pair), objects))

    def get(self, objects: Sequence[tuple[str, memoryview]], *, land: bool = True, summed_bytes: int = 0) -> None:
        """Loads each object into its target. land: False throws away what the client gives as bytes of its own.
        summed_bytes: and makes the checksum of every so many bytes, as who trusts no store has to."""

        def one(pair: tuple[str, memoryview]) -> None:
            name, target = pair
            data = self.get_one(name, target)
            if data is not None and land:
                np.copyto(np.frombuffer(target, np.uint8), np.frombuffer(data, np.uint8))  # without the GIL
            for start in range(0, len(target), summed_bytes) if summed_bytes else ():
                xxhash.xxh3_128_digest(target[start : start + summed_bytes])

        list(self._readers.map(one, objects))

    def close(self) -> None:
        self._readers.shutdown()
        self._writers.shutdown()

    @abstractmethod
    def put_one(self, name: str, data: bytes) -> None:
        """Stores an object."""

    @abstractmethod
    def get_one(self, name: str, target: memoryview) -> Any:
        """Loads an object as long as `target`, there, or else returns its bytes. Fails if there is none."""

    @abstractmethod
    def delete(self, names: Sequence[str]) -> None:
        """Takes objects away."""


class _Files(BareClient):
    lands = True

    def __init__(self, threads: int, root: Path) -> None:
        super().__init__(threads)
        self._root = root

    def put_one(self, name: str, data: bytes) -> None:
        path = self._root / f"{name}.tmp"
        path.write_bytes(data)
        path.rename(self._root / name)

    def get_one(self, name: str, target: memoryview) -> Any:
        with (self._root / name).open("rb", buffering=0) as file:
            if file.readinto(target) != len(target):
                raise AssertionError(name)
        return None

    def delete(self, names: Sequence[str]) -> None:
        for name in names:
            os.unlink(self._root / name)  # noqa: PTH108


class _Valkey(BareClient):
    def __init__(self, threads: int, url: str) -> None:
        import valkey

        super().__init__(threads)
        ca = dict(parse_qsl(urlsplit(url).query)).get("ca")
        self._client: Any = valkey.Valkey.from_url(url.partition("?")[0], **({"ssl_ca_certs": ca} if ca else {}))

    def put_one(self, name: str, data: bytes) -> None:
        self._client.set(name, data)

    def get_one(self, name: str, target: memoryview) -> Any:
        return _whole(self._client.get(name), name, target)

    def delete(self, names: Sequence[str]) -> None:
        self._client.delete(*names)


class _Obstore(BareClient):
    def __init__(self, threads: int, url: str) -> None:
        from obstore.store import from_url

        super().__init__(threads)
        parts = urlsplit(url)
        options: dict[str, Any] = dict(parse_qsl(parts.query))
        if parts.username:
            options |= {"access_key_id": unquote(parts.username), "secret_access_key": unquote(parts.password or "")}
        options.setdefault("region", "us-east-1")
        address = f"{parts.scheme}://{parts.hostname}{parts.path}"
        client: Any = {"allow_http": True}
        if "ca" in options:
            client["root_certificate"] = Path(options.pop("ca")).read_text()
        self._store: Any = from_url(address, client_options=client, **options)

    def put_one(self, name: str, data: bytes) -> None:
        import obstore

        obstore.put(self._store, name, data, use_multipart=False)

    def get_one(self, name: str, target: memoryview) -> Any:
        import obstore

        return _whole(obstore.get(self._store, name).bytes(), name, target)

    def delete(self, names: Sequence[str]) -> None:
        import obstore

        obstore.delete(self._store, list(names))


class _Mooncake(BareClient):
    """The client of the tier itself, since a process can have few; without its lanes, and with bytes for values."""

    def __init__(self, threads: int, url: str) -> None:
        from mooncake.store import MooncakeDistributedStore

        from cairn.tier.remote import open_store

        super().__init__(threads)
        cluster = open_store(url)._cluster  # type: ignore[attr-defined]
        self._client = MooncakeDistributedStore()
        code = self._client.setup(cluster.host, cluster.metadata, 0, 128 << 20, "tcp", "", cluster.master)
        if code != 0:
            raise InputError(f"{url}: mooncake answers {code}")

    def put_one(self, name: str, data: bytes) -> None:
        if self._client.put(name, data) != 0:
            raise AssertionError(name)

    def get_one(self, name: str, target: memoryview) -> Any:
        return _whole(self._client.get(name), name, target)

    def delete(self, names: Sequence[str]) -> None:
        self._client.batch_remove(list(names), True)

    def close(self) -> None:
        super().close()
        self._client.close()


def _whole(data: Any, name: str, target: memoryview) -> Any:
    if len(data) != len(target):
        raise AssertionError(name)
    return data


@contextlib.contextmanager
def bare_client(url: str, threads: int) -> Iterator[BareClient]:
    """The usual client of the store that a URL means. Raises InputError if there is none here."""
    scheme = urlsplit(url).scheme
    client: BareClient
    if scheme == "file":
        root = Path(unquote(urlsplit(url).path))
        try:
            root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"{root}: {error.strerror}; name a directory that can be written") from None
        client = _Files(threads, root)
    elif scheme in ("valkey", "valkeys", "redis", "rediss"):
        client = _Valkey(threads, url)
    elif scheme in ("s3", "gs", "az"):
        client = _Obstore(threads, url)
    elif scheme == "mooncake":
        client = _Mooncake(threads, url)
    else:
        raise InputError(f"{scheme}://: there is no bare client to compare with; it can be used, but not measured")
    try:
        yield client
    finally:
        client.close()
