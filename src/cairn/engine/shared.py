"""Stores that a host's engines share through its node; what they need is loaded only where there is one."""

from typing import TYPE_CHECKING

from cairn.config import Config
from cairn.copy import Copier
from cairn.engine.base import BlockStore
from cairn.errors import ConfigError
from cairn.kv import KVGeometry, Layout
from cairn.observe.metrics import Metrics
from cairn.plan import CostModel

if TYPE_CHECKING:
    from cairn.engine.vram_orders import OrderedVramStore


def open_node(
    address: str,
    config: Config,
    geometry: KVGeometry,
    layout: Layout,
    metrics: Metrics,
    cost: CostModel,
    *,
    canonical: bool,
) -> BlockStore:
    """The node's store: see `NodeStore`, whose sockets are loaded only by who has a node."""
    from cairn.engine.node_store import NodeStore

    return NodeStore(
        address,
        geometry,
        layout,
        timeout_s=config.node.timeout_s,
        wait_s=config.engine.timeout_s,
        metrics=metrics,
        cost=cost,
        canonical=canonical,
    )


def open_vram(
    address: str | None,
    config: Config,
    geometry: KVGeometry,
    layout: Layout,
    metrics: Metrics,
    cost: CostModel,
    *,
    canonical: bool,
) -> tuple[BlockStore, Copier]:
    """The node's store with this process's VRAM before it, and what copies there: see `VramStore`."""
    from cairn.engine.vram_store import open_vram_store

    if address is None:
        raise ConfigError(
            "storage.vram.size: VRAM is shared through the host's node; set node.address, or the size to 0"
        )
    return open_vram_store(address, config, geometry, layout, metrics, cost, canonical=canonical)


def open_ordered_vram(
    config: Config, geometry: KVGeometry, layout: Layout, metrics: Metrics, cost: CostModel, *, canonical: bool
) -> "OrderedVramStore":
    """The node's store with another process's VRAM before it: see `OrderedVramStore`."""
    from cairn.engine.vram_orders import OrderedVramStore

    assert config.node.address
    return OrderedVramStore(
        config.node.address,
        geometry,
        layout,
        timeout_s=config.node.timeout_s,
        wait_s=config.engine.timeout_s,
        metrics=metrics,
        cost=cost,
        canonical=canonical,
    )
