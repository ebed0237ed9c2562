"""What the host's node keeps its blocks in: an embedded store, in an arena of the node's."""

from collections.abc import Callable

from cairn.config import Config
from cairn.engine.local import open_local
from cairn.engine.rehearsal import rehearse
from cairn.index import POLICIES
from cairn.kv import KVGeometry, Layout
from cairn.node.base import Opened
from cairn.observe.metrics import Metrics
from cairn.plan import CostModel
from cairn.tier.arena import Arena
from cairn.tier.base import Tier


def prepare(config: Config) -> None:
    """Has compiled what a pool needs, so that the first client does not wait for it: up to a minute once installed."""
    for policy in {config.storage.vram.policy, config.storage.cpu.policy, config.storage.disk.policy}:
        rehearse(POLICIES[policy])


def open_pool(
    config: Config,
    geometry: KVGeometry,
    layout: Layout,
    arena: Arena,
    peers: Callable[[KVGeometry, Layout], Tier] | None = None,
) -> Opened:
    """The tiers that the configuration asks for, DRAM in `arena`. peers: makes the tier of other hosts' nodes.

    Raises StorageError or ConfigError.
    """
    prepare(config)
    metrics = Metrics()
    tier = peers(geometry, layout) if peers else None
    return Opened(open_local(config, geometry, layout, metrics, CostModel(), arena, tier), metrics)
