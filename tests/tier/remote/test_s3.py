"""What an S3 server's answers mean, from one that answers everything alike."""

import contextlib
import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np
import pytest
import xxhash

from cairn.observe.reasons import Reason
from cairn.tier.remote import open_store
from cairn.tier.remote.base import Get
from cairn.tier.remote.s3 import LANES
from cairn.transport.moving import sums_of
from tests.tier.remote.servers import until
from tests.tier.rig import soon


@contextmanager
def answering(status: int, size: int = 0) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", str(size))
            self.send_header("last-modified", "Sun, 29 Nov 2026 10:00:00 GMT")
            self.end_headers()
            with suppress(OSError):
                for _ in range(size >> 20):
                    self.wfile.write(bytes(1 << 20))

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"s3://key:secret@bucket/cairn?endpoint=http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@contextmanager
def holding(content: bytes, hang: threading.Event) -> Iterator[str]:
    """All objects have the content; those whose names end with `late` send the second half of it after `hang`."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("content-length", str(len(content)))
            self.send_header("last-modified", "Wed, 21 Oct 2015 07:28:00 GMT")
            self.end_headers()
            half = len(content) // 2
            self.wfile.write(content[:half])
            if self.path.endswith("late"):
                hang.wait(20)
            with contextlib.suppress(OSError):  # nobody may be there any more
                self.wfile.write(content[half:])

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"s3://key:secret@bucket/cairn?endpoint=http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_one_object_that_hangs_takes_nothing_from_those_before_it() -> None:
    """All of a call are loaded in one lane; what has come counts, and what comes late touches nothing."""
    content, hang = bytes(range(1, 251)) * 4000, threading.Event()
    targets = [np.zeros(len(content), np.uint8) for _ in range(3)]
    with holding(content, hang) as url:
        store = open_store(url)
        gets = [
            Get(name, 0, [target.data], whole=True, sums=sums_of([target.data]))
            for name, target in zip((b"first", b"late", b"last"), targets, strict=True)
        ]
        assert store.get_into(gets, deadline=soon(3)) == [len(content), Reason.TIMEOUT, Reason.TIMEOUT]
        assert bytes(targets[0]) == content
        assert gets[0].sums is not None
        assert gets[0].sums[0].tobytes() == xxhash.xxh3_128_digest(content)
        before = [bytes(target) for target in targets[1:]]
        hang.set()
        until(lambda: store.stats()["free_lanes"] == LANES, "the lane is free again")
        assert [bytes(target) for target in targets[1:]] == before
        assert not any(targets[2])
        assert store.stats()["abandoned_calls_total"] == 1
        store.close()


def test_an_object_that_is_longer_than_asked_for_fills_what_there_is_and_is_told() -> None:
    content = bytes(range(1, 251)) * 4000
    with holding(content, threading.Event()) as url:
        store = open_store(url)
        row = np.zeros(1000, np.uint8)
        (answer,) = store.get_into([Get(b"long", 0, [row[:500].data], whole=True)], deadline=soon(20))
        assert isinstance(answer, int)
        assert answer > 500
        assert bytes(row) == content[:500] + bytes(500)
        store.close()


@pytest.mark.parametrize(("status", "answer"), [(500, Reason.IO_ERROR), (403, Reason.IO_ERROR), (416, 0)])
def test_a_failure_is_one_whatever_the_object_is_called(status: int, answer: int | Reason) -> None:
    with answering(status) as url:
        store = open_store(url)
        part = memoryview(bytearray(4))
        assert store.get_into([Get(b"cairn/0416f/4160", 8, [part])], deadline=soon(20)) == [answer]
        store.close()


def test_an_object_larger_than_any_of_ours_is_not_read() -> None:
    """Its size is the store's word, and all of it would be taken into memory."""
    with answering(200, 1 << 40) as url:
        store = open_store(url)
        get = Get(b"cairn/one", 0, [memoryview(bytearray(4))], whole=True)
        [found] = store.get_into([get], deadline=soon(5))
        assert isinstance(found, int)
        assert 4 < found < 1 << 20, "the pieces that told"
        store.close()
