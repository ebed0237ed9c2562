"""A writer that takes the lock again at once lets the reader in that waits."""

import threading
import time

from cairn.fleet.fair import FairLock


def test_nobody_overtakes_who_waits() -> None:
    lock, order = FairLock(), []

    def read() -> None:
        with lock:
            order.append("reader")

    reader = threading.Thread(target=read)
    with lock:
        assert not lock.waiting[0]
        reader.start()
        deadline = time.monotonic() + 30
        while not (lock._gate.locked() and lock.waiting[0]):  # until the reader waits
            assert time.monotonic() < deadline
    with lock:
        order.append("writer")
    reader.join()
    assert order == ["reader", "writer"]
    assert not lock.waiting[0]
