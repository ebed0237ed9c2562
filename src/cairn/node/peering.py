"""A node among those of other hosts: what it answers them, how it finds them, and the tier that reads from them."""

import asyncio
import logging
import secrets
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Final
from urllib.parse import urlsplit

from cairn.cluster import HostNode, HostNodes, Registration, open_registry
from cairn.cluster import Keys as ClusterKeys
from cairn.config import Config
from cairn.errors import CairnError, ClusterError
from cairn.kv import KVGeometry, Layout
from cairn.node.lending import Lending
from cairn.node.peer_service import PeerService
from cairn.node.pools import directory_of
from cairn.node.server import Node
from cairn.observe.access import is_loopback
from cairn.observe.log import log_once
from cairn.tier.known import ABSENT_S, HANDOVER_ABSENT_S
from cairn.tier.peer import Limits, Peers, PeerTier
from cairn.tier.peer.wire import Keypair
from cairn.transport.mooncake import MooncakeTransport

log = logging.getLogger(__name__)

_RETRY_S: Final = 1.0
_CLOSE_S: Final = 5.0


class Peering:
    """Takes part in it as `node.peers` says, from `serve` until `close`. Raises ConfigError or StorageError where it
    cannot.
    """

    def __init__(self, config: Config) -> None:
        settings = config.node.peers
        assert settings.address is not None
        assert settings.secret is not None
        host = urlsplit(settings.address).hostname or ""
        self._config = config
        self._keypair = Keypair(settings.secret.get_secret_value())
        self._transport = MooncakeTransport(host, protocol=settings.protocol, device=settings.device)
        self._peers = Peers(self._keypair)
        self._peers.replace(one for one in settings.known if one != settings.address)
        self._service: PeerService | None = None
        self._discovery: Discovery | None = None
        if not is_loopback(host):
            log.warning(
                "peers read DRAM by a data plane that asks nobody who he is: keep %s among your own hosts", host
            )

    def tier(self, geometry: KVGeometry, layout: Layout) -> PeerTier:
        """The peers' blocks, for a pool."""
        settings = self._config.node.peers
        absent_s = HANDOVER_ABSENT_S if self._config.engine.enable_disagg_pd else ABSENT_S
        limits = Limits(settings.timeout_s, settings.lookup_timeout_s, absent_s)
        return PeerTier(self._peers, self._transport, directory_of(geometry, layout), geometry.block_bytes, limits)

    def serve(self, node: Node) -> str:
        """Answers peers from now on, and looks for them; returns by which address."""
        settings = self._config.node.peers
        assert settings.address is not None
        self._service = PeerService(settings.address, self._keypair, Lending(self._transport, node.open_pools))
        address = self._service.address
        node.counted()[""].watch("lending", self._service.lending.figures)
        if self._config.cluster.etcd_addr:
            self._discovery = Discovery(self._config, address, self._peers)
        return address

    def leave(self) -> None:
        """Answers nobody any more, and lends nothing: before the pools are closed."""
        if self._discovery:
            self._discovery.close()
        if self._service:
            self._service.close()

    def close(self) -> None:
        """After the pools are closed."""
        self._peers.close()
        self._transport.close()


class Discovery:
    """Keeps this node registered in the cluster's registry, and the peers those who are, beside `node.peers.known`.

    While the registry is away, those known last stay.
    """

    def __init__(self, config: Config, address: str, peers: Peers) -> None:
        self._config = config
        self._address = address
        self._peers = peers
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._run())
        self._thread = threading.Thread(target=self._wait, name="cairn-node-discovery", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Deregisters."""
        with suppress(RuntimeError):  # its loop is closed: it has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join(_CLOSE_S)

    def _wait(self) -> None:
        try:
            self._loop.run_until_complete(self._task)
        except asyncio.CancelledError:
            pass
        except CairnError as error:
            log.error("other nodes are not looked for: %s", error)
        self._loop.close()

    async def _run(self) -> None:
        cluster = self._config.cluster
        keys, name = ClusterKeys(cluster.namespace), self._address.removeprefix("tcp://")
        me = HostNode(incarnation=secrets.token_hex(8), name=name, peers=self._address, started=time.time())
        async with open_registry(cluster) as registry, HostNodes(registry, keys, self._found):
            while True:
                try:
                    async with Registration(registry, keys.node(name), me, cluster.lease_s) as registration:
                        await registration.superseded.wait()
                        await asyncio.Event().wait()  # the younger one has the name; the others are followed still
                except ClusterError as error:
                    log_once(log, "registration", f"peers cannot find this node: {error}")
                await asyncio.sleep(_RETRY_S)

    def _found(self, nodes: Mapping[str, HostNode]) -> None:
        addresses = [*self._config.node.peers.known, *(node.peers for node in nodes.values())]
        self._peers.replace(one for one in addresses if one != self._address)
