"""What the service answers, whatever it was asked over: scores of instances, and decisions remembered."""

from collections.abc import Collection, Mapping
from typing import NamedTuple, Protocol

from cairn.fleet import FleetIndex, Score, Source, Speculation, Tier, score
from cairn.fleet.score import WEIGHTS
from cairn.serve.base import RequestError, Tokens


class Sources(Protocol):
    """Who is followed."""

    def sources(self) -> Mapping[Source, str]:
        """Every source with the model it serves ("": not told)."""


class Query(NamedTuple):
    """A prompt, under a namespace as events tell it (`cairn.fleet.separation.namespace_digest`), and who is asked for
    it. model: leaves out instances that serve another. instances: None: all. weights: of a token, by tier.
    """

    tokens: Tokens
    model: str | None = None
    instances: Collection[str] | None = None
    namespace: bytes = b""
    weights: Mapping[Tier, float] | None = None


class Answer(NamedTuple):
    """scores: of every source asked for. unknown: instances asked for that are not followed, or serve another model."""

    scores: Mapping[Source, Score]
    unknown: list[str]

    def best(self) -> dict[str, tuple[int, Score]]:
        """By instance the best rank and its score; the lower rank where they are equal."""
        found: dict[str, tuple[int, Score]] = {}
        for source, one in sorted(self.scores.items()):
            if source.instance not in found or one.score > found[source.instance][1].score:
                found[source.instance] = source.rank, one
        return found


class Lookup:
    """Thread-safe. A lookup waits for no events but those that change the index at that moment (`FleetIndex`)."""

    def __init__(
        self,
        index: FleetIndex,
        speculation: Speculation,
        sources: Sources,
        weights: Mapping[Tier, float] = WEIGHTS,
    ) -> None:
        self._index, self._speculation = index, speculation
        self._sources, self._weights = sources, weights

    def score(self, query: Query) -> Answer:
        """How good each source is for a prompt; see `cairn.fleet.score`."""
        sources, unknown = self._asked(query)
        weights = self._weights if query.weights is None else query.weights
        found = score(
            self._index, query.tokens, sources, weights, namespace=query.namespace, speculation=self._speculation
        )
        return Answer(found, unknown)

    def routed(self, query: Query, instance: str, rank: int | None) -> None:
        """A prompt was sent to an instance: for a few seconds it counts as held there. rank: None: the instance chooses
        one itself, so all count. Raises RequestError.
        """
        ranks = [source for source in self._sources.sources() if source.instance == instance]
        if rank is not None:
            ranks = [source for source in ranks if source.rank == rank]
        if not ranks:
            asked = instance if rank is None else f"{instance}, rank {rank}"
            raise RequestError(f"instance {asked[:100]!r}: not followed; /instances lists those that are", 404)
        hashed = self._index.hashed(query.tokens, query.namespace)
        for source in ranks:
            self._speculation.routed(source, hashed)

    def _asked(self, query: Query) -> tuple[list[Source], list[str]]:
        every = self._sources.sources()
        wanted = None if query.instances is None else frozenset(query.instances)
        sources = [
            source
            for source, model in every.items()
            if (wanted is None or source.instance in wanted) and (not model or query.model in (None, model))
        ]
        return sources, [] if wanted is None else sorted(wanted - {source.instance for source in sources})
