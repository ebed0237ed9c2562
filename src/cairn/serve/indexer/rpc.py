"""gRPC: llm-d's IndexerService, so that its schedulers can ask Cairn."""

import logging
import time
from collections.abc import Sequence
from typing import Final, TypeAlias

import grpc
import grpc.aio

from cairn.errors import InputError
from cairn.observe.access import may_pass
from cairn.observe.log import log_once
from cairn.serve.auth import REFUSED
from cairn.serve.base import RequestError, within
from cairn.serve.indexer.lookup import Answer, Query
from cairn.serve.indexer.parts import Parts
from cairn.serve.proto.indexer_pb2 import GetPodScoresRequest, GetPodScoresResponse, PodScore
from cairn.serve.proto.indexer_pb2_grpc import add_IndexerServiceServicer_to_server

logger = logging.getLogger(__name__)

_CODES: Final = {
    401: grpc.StatusCode.UNAUTHENTICATED,
    403: grpc.StatusCode.PERMISSION_DENIED,
    404: grpc.StatusCode.NOT_FOUND,
    413: grpc.StatusCode.RESOURCE_EXHAUSTED,
    503: grpc.StatusCode.UNAVAILABLE,
    504: grpc.StatusCode.DEADLINE_EXCEEDED,
}

#: What a call is told of itself.
Context: TypeAlias = "grpc.aio.ServicerContext[GetPodScoresRequest, GetPodScoresResponse]"


class PodScores:
    """The service's methods."""

    def __init__(self, parts: Parts, tokens: Sequence[str]) -> None:
        self._parts, self._tokens = parts, tokens

    async def GetPodScores(  # noqa: N802 - llm-d's
        self, request: GetPodScoresRequest, context: Context
    ) -> GetPodScoresResponse:
        """Scores of pods for a completion's prompt; those that hold nothing of it are left out."""
        begun, code = time.perf_counter(), grpc.StatusCode.CANCELLED
        try:
            answer = await self._score(request, context)
            code = grpc.StatusCode.OK
            return _response(answer)
        except InputError as error:
            status = error.status if isinstance(error, RequestError) else 400
            code = _CODES.get(status, grpc.StatusCode.INVALID_ARGUMENT)
            await context.abort(code, str(error))
        except Exception as error:  # noqa: BLE001 - counted, and logged
            code = grpc.StatusCode.INTERNAL
            log_once(logger, f"rpc {type(error).__name__}", f"a call failed: {error!r}")
            await context.abort(code, "this call failed inside; the service's log has it")
        finally:  # abort has raised where it was called
            self._parts.metrics.observe("GetPodScores", code.name, time.perf_counter() - begun)
        raise AssertionError

    async def _score(self, request: GetPodScoresRequest, context: Context) -> Answer:
        given = dict(context.invocation_metadata() or ()).get("authorization")
        if self._tokens and not any(may_pass(given, token) for token in self._tokens):
            raise RequestError(REFUSED, 401)
        left = context.time_remaining()
        seconds = self._parts.bounds.request if left is None else min(left, self._parts.bounds.request)
        model = request.model_name or None
        tokens = await within(seconds, self._parts.tokenizers.text_async(model, request.prompt))
        self._parts.metrics.queried(len(tokens))
        return self._parts.lookup.score(Query(tokens, model, list(request.pod_identifiers) or None))


def make_server(
    parts: Parts, tokens: Sequence[str], address: str, option: str = "--rpc-port"
) -> tuple[grpc.aio.Server, int]:
    """A server that listens on `address` once started, and its port. tokens: calls must carry one of them, if there are
    any. Raises InputError, with the option that mends it, if it cannot.
    """
    server = grpc.aio.server(
        options=[
            ("grpc.so_reuseport", 0),  # a second service on the port must fail, not share it
            ("grpc.max_receive_message_length", parts.bounds.body),
            ("grpc.max_concurrent_streams", parts.bounds.waiting),
        ],
        maximum_concurrent_rpcs=parts.bounds.waiting,
    )
    add_IndexerServiceServicer_to_server(PodScores(parts, tokens), server)
    try:
        port = server.add_insecure_port(address)
    except RuntimeError:
        port = 0
    if not port:
        raise InputError(f"gRPC on {address}: in use, or not this host's; name another with {option} or --host")
    return server, port


def _response(answer: Answer) -> GetPodScoresResponse:
    ranks: dict[str, int] = {}
    for source in answer.scores:
        ranks[source.instance] = ranks.get(source.instance, 0) + 1
    scores = [
        PodScore(
            pod=source.instance,
            score=one.score,
            data_parallel_rank=source.rank if ranks[source.instance] > 1 else None,
        )
        for source, one in answer.scores.items()
        if one.score > 0
    ]
    return GetPodScoresResponse(scores=scores)
