"""A worker's side: copies between the arena, which it shares with the scheduler, and its own paged cache."""

import logging
import re
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from cairn.config import Config
from cairn.connect.vllm.blend_model import model_of
from cairn.connect.vllm.blender import Blender
from cairn.connect.vllm.blending import Settings, no_blending
from cairn.connect.vllm.messages import Blend, Copy, Done, Learn, Orders
from cairn.connect.vllm.model import Served, own_arena
from cairn.connect.vllm.movers import Copying, Layers, Mover, Polled, Rows, by_token, mover_for
from cairn.connect.vllm.pages import prove_order
from cairn.connect.vllm.places import Places, Refused, refused
from cairn.connect.vllm.timed_steps import StepTimers
from cairn.connect.vllm.vram import VramError, WorkerVram
from cairn.copy import RowMemory, TokenSlots
from cairn.errors import GeometryError
from cairn.node.base import VramHome
from cairn.observe.log import log_once
from cairn.observe.reasons import Reason
from cairn.tier.arena import Arena

logger = logging.getLogger(__name__)

_Order = Copy | Blend | Learn
_Begun = tuple[_Order, Polled]


class WorkerSide:
    """Lives in one rank's worker. Called by the model runner's thread alone, which never waits for a copy.

    A copy that fails is reported, never raised: a load's blocks as invalid, so that vLLM computes them, a store's as
    not stored. While a failed load of a running step has not been heard of, nothing is stored: it may be computed from
    what the load left behind. overlapping: see `mode.steps_overlap`. blending: how to blend, if that is to be done.
    attentions: vLLM's attention modules by the names of their layers, which lead to the model that is to blend.
    """

    def __init__(
        self,
        served: Served,
        rank: int,
        config: Config,
        overlapping: bool = False,
        blending: Settings | None = None,
        attentions: Mapping[str, Any] | None = None,
    ) -> None:
        self._blending = blending
        self._attentions = attentions or {}
        self._blender: Blender | None = None
        self._node = config.node
        self._config = config
        self._vram: WorkerVram | None = None
        self._told = 0
        self._own = None if config.node.address else own_arena(served, config)
        self._served = served
        self._part = served.part(rank)
        self._block = served.block_tokens
        self._geometry = served.shards[rank]
        self._quantizer = served.quantizer(rank)
        self._first_stage = rank < served.ranks // served.stages
        self._threads = config.engine.copy_threads
        self._compressed = config.compression.algorithm != "none"
        self._overlapping = overlapping
        self._timeout = config.engine.timeout_s
        self._places: Places | None = None
        self._layer_of: dict[str, int] = {}
        self._orders = Orders()
        self._timers = StepTimers()
        self._layered: list[tuple[Copy, Layers, float]] = []
        self._ended: list[_Begun] = []
        self._loads: list[_Begun] = []
        self._stores: list[_Begun] = []
        self._unheard: set[int] = set()
        self._invalid: set[int] = set()
        self._done = Done()

    def register(self, kv_caches: dict[str, Any]) -> None:
        """The paged cache, a tensor a layer by name."""
        names = sorted(kv_caches, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
        self._layer_of = {name: i for i, name in enumerate(names)}
        tensors = [kv_caches[name] for name in names]
        if self._served.layout.page == "vllm_cpu" and not (tensors[0].dim() == 4 and tensors[0][0].is_contiguous()):
            raise GeometryError(
                f"pages of shape {tuple(tensors[0].shape[1:])}, strides {tensors[0].stride()[1:]}: not those of vLLM's "
                "CPU backend, though its operator writes such; please report this, and serve without CairnConnector"
            )

        def mover(arena: Arena) -> Mover:
            rows = arena.memory[:, self._part]
            made = mover_for(
                tensors,
                self._geometry,
                rows,
                arena.memory,
                threads=self._threads,
                overlapping=self._overlapping,
                compressed=self._compressed,
                quantizer=self._quantizer,
                page=self._served.layout,
                vram=self._config.storage.vram.size > 0,
            )
            if self._blending and made.kv.opaque:
                made.by_token = by_token(tensors, self._geometry, rows, arena.memory)
            return made

        self._places = Places(mover, self._own)
        if self._node.address:
            served = self._served
            self._places.find(self._node.address, served.row_geometry, served.row_layout, self._node.timeout_s)
        if self._config.storage.vram.size:
            self._vram = WorkerVram(self._config, self._served)
        if self._blending:
            self._find_model(self._blending, names, tensors)

    # --- a step --------------------------------------------------------------------------------------------------

    def begin(self, orders: Orders) -> None:
        """A step begins."""
        self.store()
        self._orders = orders
        self._unheard -= orders.forgiven
        mover = self._all_places.mover
        if orders.work and mover and self._first_stage:  # later ones would measure how they wait for it
            self._timers.begin(orders.work, mover.timer())
        if self._vram and (donation := self._vram.donation()) != self._told:
            self._told = self._done.donation = donation

    def foresee(self, orders: Orders) -> None:
        """The next step will have these orders, and is yet to be prepared. If blocks of stores under way are to be
        overwritten, not before those are over; and what the pass follows begins now where it can, a millisecond sooner.
        """
        self.store()
        if orders.settle_stores:
            self._all_places.settle_stores()
        mover = self._all_places.mover
        if orders.early and mover and mover.early:
            self._follow(orders)

    def start_loads(self) -> None:
        """Starts the step's loads; called once a step, before or after its forward pass."""
        self._follow(self._orders)
        self._loads += [(copy, self._copy(copy, store=False)) for copy in self._orders.loads]
        self._orders.loads = []

    def wait_for_layer(self, name: str) -> None:
        """Before a layer's attention: waits until the layer is loaded, or never will be."""
        layer = self._layer_of.get(name)
        if layer is None:
            return  # it reads an earlier layer's cache
        for _, load, started in self._layered:
            load.wait(layer, max(0.0, started + self._timeout - time.monotonic()))

    def end(self) -> None:
        """After the forward pass: settles the step's own loads, and blends, behind what the pass has computed."""
        self._timers.stop()
        for copy, layers, _ in self._layered:
            over = layers.end()
            if over.done() and over.exception():
                self._unheard.add(copy.number)
            self._ended.append((copy, over))
        self._layered.clear()
        if self._blender:  # orders come once it has been said to be there
            self._loads += [(blend, self._blender.run(blend)) for blend in self._orders.blends]
            self._stores += [(learn, self._blender.learn(learn)) for learn in self._orders.learns]
        self._orders.blends, self._orders.learns = [], []

    def store(self) -> None:
        """Starts the step's stores, once all that writes KV in it is over, a draft model's pass too: with the next step
        at the latest, as vLLM tells not every rank, and not of every step.
        """
        for copy in self._orders.stores:
            if self._unheard:
                self._report(copy, 0.0, Reason.IO_ERROR)
            else:
                self._stores.append((copy, self._copy(copy, store=True)))
        self._orders.stores = []

    def finished_loads(self) -> set[str]:
        """Requests that waited outside of steps and whose loads are over."""
        self._stores = self._collect(self._stores, loads=False)
        self._ended = self._collect(self._ended, loads=True)
        before = {copy.request for copy, _ in self._loads}
        self._loads = self._collect(self._loads, loads=True)
        return before - {copy.request for copy, _ in self._loads}

    def released(self) -> set[str]:
        """Requests whose blocks vLLM may free."""
        released, self._orders.released = self._orders.released, set()
        return released

    def invalid_pages(self) -> set[int]:
        """Pages that could not be loaded, since the last call."""
        invalid, self._invalid = self._invalid, set()
        return invalid

    def report(self) -> Done | None:
        """What was done since the last call."""
        timed = self._timers.next()
        if timed:
            self._done.work, self._done.work_seconds = timed
        done, self._done = self._done, Done()
        told = done.copies or done.work or done.blends or done.donation is not None
        return done if told else None

    def close(self) -> None:
        if self._places:
            self._places.close()
        if self._vram:
            self._vram.close()

    # --- parts ---------------------------------------------------------------------------------------------------

    def _find_model(self, blending: Settings, names: list[str], tensors: list[Any]) -> None:
        """Gets ready to blend with the model that writes these tensors, by the names of its layers, or says why not."""
        attentions, layout = [self._attentions.get(name) for name in names], self._served.layout
        try:
            model = model_of(attentions)
            if layout.page != "vllm_cpu":
                prove_order(tensors[0], self._geometry, attentions[0])
            self._blender = Blender(
                model,
                blending.recipe,
                self._geometry,
                layout,
                tensors,
                self._all_places,
                self._timeout,
                self._quantizer,
            )
            self._done.blends = True
        except GeometryError as error:
            no_blending(error)

    @property
    def _all_places(self) -> Places:
        assert self._places is not None
        return self._places

    def _copy(self, copy: Copy, *, store: bool) -> Polled:
        if isinstance(copy.home, VramHome):
            return self._copy_vram(copy, copy.home, store=store)
        place = self._all_places.at(copy.home)
        if place is None:
            return refused()
        return place.copy(place.mover.store if store else place.mover.load, *self._both(copy))

    def _copy_vram(self, copy: Copy, home: VramHome, *, store: bool) -> Polled:
        slots, rows = self._both(copy)

        def begin(memory: RowMemory) -> Copying:
            mover = self._all_places.mover  # the latest: it may begin later
            if mover is None:
                return refused()
            return mover.store(slots, rows, memory) if store else mover.load(slots, rows, memory)

        return self._vram.copy(home, begin, self._all_places.entrance(home.gate)) if self._vram else refused()

    def _follow(self, orders: Orders) -> None:
        """Starts the loads that the step's pass follows, once."""
        if orders.layered:
            now = time.monotonic()
            self._layered += [(copy, self._load_layers(copy), now) for copy in orders.layered]
            orders.layered = []

    def _load_layers(self, copy: Copy) -> Layers:
        place = self._all_places.at(copy.home)
        return place.load_layers(*self._both(copy)) if place else Refused()

    def _both(self, copy: Copy) -> tuple[TokenSlots, Rows]:
        """A copy's token slots and its rows."""
        first = np.asarray(copy.pages, np.int64) * self._block
        return (first[:, None] + np.arange(self._block)).reshape(-1), np.asarray(copy.rows, np.int32)

    def _collect(self, copies: list[_Begun], *, loads: bool) -> list[_Begun]:
        """Reports the copies that are over; returns the others."""
        for copy, copying in copies:
            if not copying.done():
                continue
            error = copying.exception()
            if error:
                log_once(logger, f"copy {type(error).__name__}", f"a copy failed: {error!r}")
                if not isinstance(copy, Learn) and loads:
                    self._invalid.update(copy.pages)
            if error:
                self._report(copy, 0.0, error.reason if isinstance(error, VramError) else Reason.IO_ERROR)
            else:
                self._report(copy, copying.result())
        return [(copy, copying) for copy, copying in copies if copy.number not in self._done.copies]

    def _report(self, copy: _Order, seconds: float, failed: Reason | None = None) -> None:
        self._done.copies[copy.number] = 1
        self._done.seconds[copy.number] = seconds
        if failed:
            self._done.failed[copy.number] = failed
