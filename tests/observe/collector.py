"""A collector of spans: takes OTLP over HTTP in protobuf, as OpenTelemetry's own does."""

import gzip
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple, Self

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


class Told(NamedTuple):
    """A span as it came. events: names with their attributes."""

    service: str
    name: str
    trace: str
    span: str
    parent: str
    attributes: dict[str, Any]
    events: list[tuple[str, dict[str, Any]]]


class Collector:
    """Listens on a free port."""

    def __init__(self) -> None:
        self.spans: list[Told] = []
        self._more = threading.Condition()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                packed = self.headers.get("content-encoding") == "gzip"
                collector.take(ExportTraceServiceRequest.FromString(gzip.decompress(body) if packed else body))
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def take(self, request: ExportTraceServiceRequest) -> None:
        for resource in request.resource_spans:
            service = _values(resource.resource.attributes)["service.name"]
            for scope in resource.scope_spans:
                told = [
                    Told(
                        service,
                        span.name,
                        span.trace_id.hex(),
                        span.span_id.hex(),
                        span.parent_span_id.hex(),
                        _values(span.attributes),
                        [(event.name, _values(event.attributes)) for event in span.events],
                    )
                    for span in scope.spans
                ]
                with self._more:
                    self.spans += told
                    self._more.notify_all()

    def wait_for(self, trace: str, *names: str, timeout: float = 60.0) -> dict[str, Told]:
        """The spans of a trace by name, once these are there."""
        deadline = time.monotonic() + timeout
        with self._more:
            while True:
                found = {span.name: span for span in self.spans if span.trace == trace}
                if {*names} <= found.keys():
                    return found
                assert self._more.wait(deadline - time.monotonic()), f"only {sorted(found)} came"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def _values(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
