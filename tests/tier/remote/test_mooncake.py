"""Loads from Mooncake take turns, and nobody waits long for one that does not come back."""

import ctypes
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cairn.tier.remote import Get, mooncake
from tests.tier.rig import soon


class Client:
    """Gives every object as the letter x, once it may; counts who is at it."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Semaphore(0)
        self.at_once = self.most = 0
        self._lock = threading.Lock()

    def setup(self, *_: Any) -> int:
        return 0

    def register_buffer(self, *_: int) -> int:
        return 0

    def close(self) -> None:
        pass

    def batch_get_into(self, names: list[str], addresses: list[int], sizes: list[int]) -> list[int]:
        with self._lock:
            self.at_once += 1
            self.most = max(self.most, self.at_once)
        self.begun.release()
        self.go.wait(30)
        time.sleep(0.01)
        for address, size in zip(addresses, sizes, strict=True):
            ctypes.memset(address, ord("x"), size)
        with self._lock:
            self.at_once -= 1
        return sizes


@pytest.fixture
def client() -> Client:
    return Client()


@pytest.fixture
def store(client: Client, monkeypatch: pytest.MonkeyPatch) -> Iterator[mooncake.MooncakeStore]:
    monkeypatch.setattr(mooncake, "_LOADS", 1)
    with socket.create_server(("127.0.0.1", 0)) as master:
        where = f"127.0.0.1:{master.getsockname()[1]}"
        store = mooncake.MooncakeStore(mooncake.Cluster(where, "etcd://nobody", "127.0.0.1"), lambda: client)
        yield store
        client.go.set()
        store.close()


def loads(store: mooncake.MooncakeStore, count: int) -> list[tuple[threading.Thread, bytearray]]:
    """Loads an object in each of so many threads."""
    begun = []
    for i in range(count):
        data = bytearray(4)
        get = Get(b"object-%d" % i, 0, [memoryview(data)], whole=True)
        thread = threading.Thread(target=store.get_into, args=([get],), kwargs={"deadline": soon()})
        thread.start()
        begun.append((thread, data))
    return begun


def test_loads_take_turns(store: mooncake.MooncakeStore, client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "_TURN_S", 30.0)
    client.go.set()
    for thread, data in loads(store, 8):
        thread.join()
        assert bytes(data) == b"xxxx"
    assert client.most == 1


def test_a_load_that_hangs_keeps_no_other_from_its_turn(store: mooncake.MooncakeStore, client: Client) -> None:
    under_way = loads(store, 3)
    for _ in under_way:
        assert client.begun.acquire(timeout=20)
    assert client.at_once == 3
    client.go.set()
    for thread, data in under_way:
        thread.join()
        assert bytes(data) == b"xxxx"
