"""What an S3 server's answers mean, from one that answers everything alike."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from cairn.observe.reasons import Reason
from cairn.tier.remote import open_store
from cairn.tier.remote.base import Get
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
        assert store.get_into([get], deadline=soon(5)) == [1 << 40]
        store.close()
