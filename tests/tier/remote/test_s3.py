"""What an S3 server's refusals mean, from one that answers with a status alone."""

import http.server
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from cairn.observe.reasons import Reason
from cairn.tier.remote import open_store
from cairn.tier.remote.base import Get
from tests.tier.rig import soon


@contextmanager
def answering(status: int) -> Iterator[str]:
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"s3://key:secret@bucket/cairn?endpoint=http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(("status", "answer"), [(500, Reason.IO_ERROR), (403, Reason.IO_ERROR), (416, 0)])
def test_a_failure_is_one_whatever_the_object_is_called(status: int, answer: int | Reason) -> None:
    with answering(status) as url:
        store = open_store(url)
        part = memoryview(bytearray(4))
        assert store.get_into([Get(b"cairn/0416f/4160", 8, [part])], deadline=soon(20)) == [answer]
        store.close()
