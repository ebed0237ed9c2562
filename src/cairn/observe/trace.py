"""Spans along a request, told to OpenTelemetry (the extra `trace`). Without it, and unless told to, nothing of it is
imported, and a call here costs a fraction of a microsecond.

Spans nest by OpenTelemetry's context: `with begin(...)` is the parent of what begins inside it, in this thread or
task; `joined` takes the parent from another process (W3C Trace Context), `onward` tells it to the next one. `spanned`
does the same around a coroutine, for paths on which each call counts.
"""

from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import Token
from typing import Any, Final, NamedTuple, Self, TypeVar

from cairn.config.schema import Observe
from cairn.errors import ConfigError

T = TypeVar("T")

#: Headers as ASGI has them: names in lower case.
Headers = Sequence[tuple[bytes, bytes]]

_PARENT: Final = ("traceparent", "tracestate")
#: For the collector to take spans, seconds. What it does not take is lost; nobody waits for it but the process's end.
_EXPORT_S: Final = 2.0


class _OpenTelemetry(NamedTuple):
    """tracer; propagator: reads and writes headers; context, api: the modules of these names, api: `trace`."""

    tracer: Any
    propagator: Any
    context: Any
    api: Any


#: None: nothing is traced.
_otel: _OpenTelemetry | None = None


class Span:
    """Something that takes time, begun by `begin`; this one is nothing. Ended by `end`, or by leaving `with`."""

    #: Whether anybody will see it.
    on = False

    def note(self, **attributes: Any) -> None:
        """Adds attributes: numbers, texts, booleans."""

    def event(self, name: str, **attributes: Any) -> None:
        """Something happened now."""

    def end(self) -> None:
        """It is over. Repeatable; from any thread."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...


NO_SPAN: Final = Span()
_NO_PARENT: Final = nullcontext()


def setup_tracing(config: Observe, service: str) -> None:
    """Traces from now on, if the configuration says where to; the first call of a process counts. service: its name.

    Raises ConfigError where OpenTelemetry is not installed.
    """
    global _otel
    if config.otlp_endpoint is None or _otel is not None:
        return
    try:
        from opentelemetry import context, trace
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.sdk.trace.sampling import ParentBasedTraceIdRatio
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"observe.otlp_endpoint: {error.name} is not installed; pip install 'cairn-kv[trace]' brings it"
        ) from None
    provider = TracerProvider(
        sampler=ParentBasedTraceIdRatio(config.trace_share),
        resource=Resource.create({"service.name": service}),
    )
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=config.otlp_endpoint, timeout=_EXPORT_S)))
    _otel = _OpenTelemetry(provider.get_tracer("cairn"), TraceContextTextMapPropagator(), context, trace)


def begin(name: str, **attributes: Any) -> Span:
    """A span that begins now, below the one that this thread or task is in."""
    return NO_SPAN if _otel is None else _Traced(_otel, name, attributes)


def joined(headers: Mapping[str, str] | Headers | None) -> AbstractContextManager[Any]:
    """Within it spans begin below the one that these headers name, if they name one: of HTTP, names in lower case."""
    return _NO_PARENT if _otel is None or not headers else _Joined(_otel, headers)


def onward(given: Headers) -> Headers:
    """A request's headers with the present span as the parent of what the request causes."""
    if _otel is None:
        return given
    told: dict[str, str] = {}
    _otel.propagator.inject(told)
    kept = [one for one in given if one[0].decode("latin-1") not in _PARENT]
    return [*kept, *((name.encode(), value.encode()) for name, value in told.items())]


def spanned(
    name: str,
    work: Coroutine[Any, Any, T],
    note: Callable[[T], Mapping[str, Any]] | None = None,
    below: Headers | None = None,
    **attributes: Any,
) -> Coroutine[Any, Any, T]:
    """`work`, within a span. note: further attributes, by what came of it. below: the span begins below the one that
    these headers name, as in `joined`.
    """
    return work if _otel is None else _spanned(name, work, note, below, attributes)


async def _spanned(
    name: str,
    work: Coroutine[Any, Any, T],
    note: Callable[[T], Mapping[str, Any]] | None,
    below: Headers | None,
    attributes: Mapping[str, Any],
) -> T:
    with joined(below), begin(name, **attributes) as span:
        made = await work
        if note is not None:
            span.note(**note(made))
        return made


class _Traced(Span):
    on = True

    def __init__(self, otel: _OpenTelemetry, name: str, attributes: dict[str, Any]) -> None:
        self._otel = otel
        self._span = otel.tracer.start_span(name, attributes=attributes)
        self._token: Token[Any] | None = None
        self._over = False

    def note(self, **attributes: Any) -> None:
        self._span.set_attributes(attributes)

    def event(self, name: str, **attributes: Any) -> None:
        self._span.add_event(name, attributes)

    def end(self) -> None:
        if not self._over:
            self._over = True
            self._span.end()

    def __enter__(self) -> Self:
        self._token = self._otel.context.attach(self._context())
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None:
            error = self._otel.api.Status(self._otel.api.StatusCode.ERROR, kind.__name__)
            self._span.set_status(error)  # without the exception's text, which may quote a prompt
        if self._token is not None:
            self._otel.context.detach(self._token)
        self.end()

    def _context(self) -> Any:
        return self._otel.api.set_span_in_context(self._span)


class _Joined:
    def __init__(self, otel: _OpenTelemetry, headers: Mapping[str, str] | Headers) -> None:
        self._otel = otel
        if isinstance(headers, Mapping):
            self._carrier = dict(headers)
        else:
            self._carrier = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}

    def __enter__(self) -> None:
        self._token = self._otel.context.attach(self._otel.propagator.extract(self._carrier))

    def __exit__(self, *_: object) -> None:
        self._otel.context.detach(self._token)
