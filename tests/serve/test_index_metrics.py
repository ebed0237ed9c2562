"""What `cairn index` shows of events that it could not use, and of what it holds."""

from prometheus_client.parser import text_string_to_metric_families

from cairn.config.schema import Index
from cairn.fleet import Removed, Source, Stored, Tier
from cairn.fleet.names import MOST_COPIES
from cairn.serve.indexer.parts import Parts


def stored(name: int, *tokens: int, parent: int | None = None) -> Stored:
    return Stored((name,), parent, tokens, 2, Tier.VRAM, b"", ())


def test_the_index_tells_what_it_could_not_use_and_what_it_holds() -> None:
    parts, source = Parts(Index(blocks=64, worker_blocks=64, sources=8)), Source("a", 0)
    parts.index.apply(source, [stored(1, 1, 2), *[stored(2, 3, 4, parent=1)] * (MOST_COPIES + 2)])
    parts.index.apply(source, [stored(3, 1, 2)])  # by another name
    parts.index.apply(source, [Removed((4,), None, None)])
    parts.index.apply(source, [stored(5, 1, 2, parent=6)])
    parts.index.apply(source, [stored(7, -1, 2)])
    parts.index.apply(source, [stored(name, name, name) for name in range(100, 200)])
    page = parts.metrics.exposition().decode()
    parts.close()
    assert {
        "cairn_index_evicted_blocks_total",
        "cairn_index_orphans_blocks_total",
        "cairn_index_unknown_blocks_total",
        "cairn_index_malformed_blocks_total",
        "cairn_index_doubles_blocks_total",
        "cairn_index_uncounted_blocks_total",
        "cairn_index_blocks",
        "cairn_index_worker_blocks",
        "cairn_index_sets",
        "cairn_index_sources",
        "cairn_index_bytes",
    } <= {one.name for family in text_string_to_metric_families(page) for one in family.samples if one.value > 0}
