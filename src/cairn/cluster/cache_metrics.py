"""What an engine's tiers hold and serve, read from its /metrics: Cairn's figures, and vLLM's prefix cache."""

from collections.abc import Iterable, Mapping
from typing import Final

from prometheus_client.samples import Sample

from cairn.cluster.values import CacheState, TierState

#: Tiers and reasons that are taken in, and characters of their names.
_TIERS: Final = 16
_REASONS: Final = 64
_NAME: Final = 64
#: vLLM's own prefix cache is the tier in VRAM.
_OWN: Final = "vllm:prefix_cache_hits_total"
#: Where there is a node, it keeps DRAM and all below for the whole host.
_OF_THE_NODE: Final = ("dram", "disk")
_HITS: Final = "cairn_hit_tokens_total"
_MISSES: Final = "cairn_miss_tokens_total"
_MOVED: Final = "cairn_transfer_bytes_total"
_TIER: Final = "cairn_tier_"
_FIGURES: Final = ("capacity_bytes", "capacity_blocks", "resident_blocks", "written_bytes", "connected")
WANTED: Final = (_OWN, _HITS, _MISSES, _MOVED, *(_TIER + name for name in _FIGURES))

#: Sums of samples, by name and by what their one or two labels of Cairn's say.
Figures = Mapping[tuple[str, ...], float]


def figures_of(samples: Iterable[Sample]) -> Figures:
    """Of those that are wanted; ranks and models are added up."""
    found: dict[tuple[str, ...], float] = {}
    for sample in samples:
        if sample.name in WANTED:
            labels = (sample.labels.get(name, "") for name in ("tier", "reason", "direction"))
            key = (sample.name, *(label[:_NAME] for label in labels if label))
            found[key] = found.get(key, 0.0) + sample.value
    return found


def cache_of(figures: Figures, incarnation: str, at: float) -> CacheState | None:
    """at: seconds since the epoch. None: the engine tells nothing of it."""
    if not figures:
        return None
    tiers = {key[1] for key in figures if key[0] != _MISSES and len(key) > 1} - {"node"}
    if (_OWN,) in figures:
        tiers.add("vram")
    misses = {key[1]: _count(amount) for key, amount in figures.items() if key[0] == _MISSES and len(key) > 1}
    return CacheState(
        incarnation=incarnation,
        time=at,
        tiers=tuple(_tier(tier, figures) for tier in sorted(tiers)[:_TIERS]),
        missed_tokens=dict(sorted(misses.items())[:_REASONS]),
    )


def _tier(tier: str, figures: Figures) -> TierState:
    def figure(name: str, *labels: str) -> float:
        return figures.get((name, tier, *labels), 0.0)

    capacity, blocks = figure(_TIER + "capacity_bytes"), figure(_TIER + "resident_blocks")
    room = figure(_TIER + "capacity_blocks")
    shared = tier in _OF_THE_NODE and figures.get((_TIER + "connected", "node"), 0.0) > 0
    writes = shared and tier != "dram"  # the node, behind its clients' back
    return TierState(
        tier=tier,
        capacity_bytes=_count(capacity),
        used_bytes=_count(capacity * blocks / room) if room else 0,
        blocks=_count(blocks),
        hit_tokens=_count(figure(_HITS) + (figures.get((_OWN,), 0.0) if tier == "vram" else 0.0)),
        load_bytes=_count(figure(_MOVED, "load")),
        store_bytes=_count(figure(_TIER + "written_bytes") if writes else figure(_MOVED, "store")),
        shared=shared,
    )


def _count(value: float) -> int:
    return int(value) if 0 <= value < 1e18 else 0
