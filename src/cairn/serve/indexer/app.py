"""HTTP: scores, decisions, state. Handlers read their bodies themselves: 131,072 tokens are half a megabyte."""

import asyncio
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Annotated, Any, Final

import msgspec
from fastapi import FastAPI
from fastapi import Query as InQuery
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cairn import __version__
from cairn.fleet import Score
from cairn.observe.log import request_id_of, serving
from cairn.observe.trace import begin, joined
from cairn.serve.auth import BearerAuth
from cairn.serve.base import Tokens, within
from cairn.serve.bodies import JSON, MSGPACK, TOKENS, Bodies
from cairn.serve.indexer.lookup import Answer, Query
from cairn.serve.indexer.metrics import IndexMetrics
from cairn.serve.indexer.models import (
    Asked,
    ChatRequest,
    HealthResponse,
    InstancesResponse,
    RoutedQuery,
    RoutedRequest,
    RoutedResponse,
    ScoreRequest,
    ScoreResponse,
    TokensQuery,
    tier_tokens,
)
from cairn.serve.indexer.openapi import describe, documented
from cairn.serve.indexer.parts import Parts
from cairn.serve.refusals import JSON_TYPE, install

#: What anybody may ask: a load balancer has no token.
OPEN: Final = ("/health", "/health/ready")
_MEASURED: Final = frozenset(
    {"/score", "/score/tokens", "/score_chat_completions", "/routed", "/routed/tokens", "/instances"}
)
BARE: Final = "Token ids, uint32 little-endian."


def make_app(parts: Parts, token: str | None) -> ASGIApp:
    """The service's HTTP face. token: what requests must carry; None: nothing."""
    app = FastAPI(title="Cairn index", version=__version__, redoc_url=None)
    install(app)
    routes = _Routes(parts)
    app.post("/score", **documented(ScoreRequest, ScoreResponse, JSON, MSGPACK))(routes.score)
    app.post("/score/tokens", **documented(BARE, ScoreResponse, TOKENS))(routes.score_tokens)
    app.post("/score_chat_completions", **documented(ChatRequest, ScoreResponse, JSON))(routes.score_chat)
    app.post("/routed", **documented(RoutedRequest, RoutedResponse, JSON, MSGPACK))(routes.routed)
    app.post("/routed/tokens", **documented(BARE, RoutedResponse, TOKENS))(routes.routed_tokens)
    app.get("/instances", **documented(None, InstancesResponse))(routes.instances)
    app.get("/health", **documented(None, HealthResponse, refusals=()))(routes.health)
    app.get("/health/ready", **documented(None, HealthResponse, refusals=(503,)))(routes.ready)
    app.get("/metrics", **documented(None, None))(routes.metrics)
    bare = partial(routes.score_tokens, asked=TokensQuery.model_validate({}))
    app.router.routes[:0] = [_Straight("/score", routes.score), _Straight("/score/tokens", bare)]
    describe(app, (ScoreRequest, ChatRequest, RoutedRequest), token is not None, OPEN)
    return _Measured(BearerAuth(app, token, OPEN), parts.metrics)


class _Straight(Route):
    """Past FastAPI to a handler, for requests without a query: to look for parameters costs as much as a short prompt's
    scores.
    """

    def __init__(self, path: str, handler: Callable[..., Any]) -> None:
        super().__init__(path, handler, methods=["POST"], include_in_schema=False)

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        posted = scope["type"] == "http" and scope["method"] == "POST" and not scope["query_string"]
        return super().matches(scope) if posted else (Match.NONE, {})


class _Measured:
    """Counts and times every request to a path that there is."""

    def __init__(self, app: ASGIApp, metrics: IndexMetrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in _MEASURED:
            return await self._app(scope, receive, send)
        begun, status = time.perf_counter(), "left"

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        headers, name = scope["headers"], scope["path"].strip("/")
        with serving(request_id_of(dict(headers))), joined(headers), begin("cairn.score", request=name) as scoring:
            try:
                await self._app(scope, receive, noting)
            finally:
                self._metrics.observe(name, status, time.perf_counter() - begun)
                scoring.note(status=status)
        return None


class _Routes:
    """A method a route."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._bodies = Bodies(parts.bounds)

    async def score(self, request: Request) -> Response:
        """Scores of instances for a prompt.

        A token held counts as much as its tier is worth; only what is held from the prompt's start on, without a hole,
        counts. In msgpack `token_ids` may be binary data, uint32 little-endian.
        """
        asked = ScoreRequest.model_validate(await self._bodies.fields(request, JSON, MSGPACK))
        return self._scores(asked, await self._tokens(asked))

    async def score_tokens(self, request: Request, asked: Annotated[TokensQuery, InQuery()]) -> Response:
        """As /score, for bare token ids: the fastest way, as nothing has to be parsed."""
        return self._scores(asked.asked(), await self._bodies.tokens(request))

    async def score_chat(self, request: Request) -> Response:
        """Scores of instances for a chat, as OpenAI's API has it: a request to /v1/chat/completions can be sent as is.

        The chat is rendered and tokenized as vLLM does; `instances`, `lora`, `cache_salt` and `weights` as in /score.
        """
        asked = ChatRequest.model_validate(await self._bodies.fields(request, JSON))
        special = asked.add_special_tokens
        tokens = await self._parts.tokenizers.chat_async(asked.model, asked.chat(), special=special)
        return self._scores(asked, tokens)

    async def routed(self, request: Request) -> Response:
        """Tells where a prompt was sent: until the instance's own events tell, it counts as held there in VRAM.

        So requests that come close together follow the first one, whose blocks nobody has told of yet.
        """
        asked = RoutedRequest.model_validate(await self._bodies.fields(request, JSON, MSGPACK))
        return self._routed(asked, await self._tokens(asked), asked.instance, asked.rank)

    async def routed_tokens(self, request: Request, asked: Annotated[RoutedQuery, InQuery()]) -> Response:
        """As /routed, for bare token ids."""
        return self._routed(asked.asked(), await self._bodies.tokens(request), asked.instance, asked.rank)

    async def instances(self, request: Request) -> Response:
        """Where each publisher's stream stands."""
        # Not on the event loop: whoever changes the index may hold its accounts for a while.
        held = await within(self._parts.bounds.request, asyncio.to_thread(self._parts.index.held))
        now, found = time.time(), []
        for state in self._parts.following.states():
            instance, source = state.instance, state.source
            found.append(
                {
                    "name": instance.name,
                    "rank": instance.rank if source is None else source.rank,
                    "model": instance.model or None,
                    "endpoint": instance.endpoint,
                    "replay": instance.replay,
                    "connected": state.connected,
                    "sequence": state.next,
                    "blocks": 0 if source is None else held.get(source, 0),
                    "age_s": max(0.0, now - state.seen) if state.seen else None,
                }
            )
        return _json({"instances": found})

    async def health(self, request: Request) -> Response:
        """Whether the service lives. Open to anybody, like /health/ready."""
        return self._health(200)

    async def ready(self, request: Request) -> Response:
        """Whether it is worth asking: every publisher has been connected to, or has had its time; 503 until then."""
        return self._health(200 if self._parts.is_ready() else 503)

    async def metrics(self, request: Request) -> Response:
        """Everything that is counted, for Prometheus."""
        text = await within(self._parts.bounds.request, asyncio.to_thread(self._parts.metrics.exposition))
        return Response(text, media_type="text/plain; version=0.0.4")

    def _health(self, status: int) -> Response:
        connected = [state.connected for state in self._parts.following.states()]
        figures = {"instances": len(connected), "connected": sum(connected)}
        ready = self._parts.is_ready()
        return _json({"status": "ok", "ready": ready, **figures, "version": __version__}, status)

    async def _tokens(self, asked: ScoreRequest) -> Tokens:
        if asked.token_ids is not None:
            tokens: Tokens = asked.token_ids
            return tokens
        assert asked.prompt is not None
        return await self._parts.tokenizers.text_async(asked.model, asked.prompt, special=asked.add_special_tokens)

    def _routed(self, asked: Asked, tokens: Tokens, instance: str, rank: int | None) -> Response:
        self._parts.lookup.routed(_query(asked, tokens), instance, rank)
        return _json({"prompt_tokens": len(tokens), "seconds": self._parts.speculation_s})

    def _scores(self, asked: Asked, tokens: Tokens) -> Response:
        """On the event loop: a lookup takes less than handing it to a thread and back would add."""
        self._parts.metrics.queried(len(tokens))
        answer = self._parts.lookup.score(_query(asked, tokens))
        return _json({"prompt_tokens": len(tokens), "scores": _by_instance(answer), "unknown": answer.unknown})


def _query(asked: Asked, tokens: Tokens) -> Query:
    weights = asked.weights.by_tier() if asked.weights else None
    return Query(tokens, asked.model, asked.instances, asked.namespace(), weights)


def _by_instance(answer: Answer) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    ranks: dict[str, dict[str, Any]] = {}
    for source, one in answer.scores.items():
        ranks.setdefault(source.instance, {})[str(source.rank)] = _score(one)
    for name, (rank, _) in answer.best().items():
        found[name] = {"rank": rank, **ranks[name][str(rank)]}
        if len(ranks[name]) > 1:
            found[name]["ranks"] = ranks[name]
    return found


def _score(one: Score) -> dict[str, Any]:
    return {"score": one.score, "tokens": tier_tokens(one)}


def _json(value: Mapping[str, Any], status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type=JSON_TYPE)
