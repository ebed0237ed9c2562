"""The worker's side of blending: puts a prompt's KV together in the paged cache, in the model runner's thread."""

import time
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Final

import numpy as np
import torch

from cairn.blend import BlendError, BlendModel, Canvas, Piece, Planes, Recipe, Turn, blend
from cairn.codec.quantized import Quantizer
from cairn.connect.vllm.messages import Blend, Learn, Part
from cairn.connect.vllm.movers import Copying, Layers, Mover, failed
from cairn.connect.vllm.pages import ArenaRows, Pages
from cairn.connect.vllm.places import Place, Places, refused
from cairn.copy import TokenSlots
from cairn.errors import CairnError
from cairn.kv import KVGeometry, Layout
from cairn.node.base import Home, VramHome

#: No slots, no rows: of a copy that is made by hand.
_NOTHING: Final = (np.empty(0, np.int64), np.empty(0, np.int32))


class Blender:
    """Blends prompts with one loaded model. For the model runner's thread alone.

    caches: vLLM's tensors, one a layer. layout: of the arena's rows, unless they are quantized. timeout_s: how long a
    load is waited for. Raises GeometryError as `Pages.of`.
    """

    def __init__(
        self,
        model: BlendModel,
        recipe: Recipe,
        geometry: KVGeometry,
        layout: Layout,
        caches: Sequence[Any],
        places: Places,
        timeout_s: float,
        quantizer: Quantizer | None = None,
    ) -> None:
        self._model = model
        self._recipe = recipe
        self._geometry = geometry
        self._layout = layout
        self._layers = [Pages.of(cache, geometry, layout) for cache in caches]
        self._places = places
        self._timeout = timeout_s
        self._quantizer = quantizer

    def run(self, order: Blend) -> Copying:
        """Makes the KV of an order's tokens complete: all of it is computed, or enqueued, on return.

        What goes wrong is the result's exception; what stands in the order's pages is nobody's KV then.
        """
        started = time.monotonic()
        loads: list[Layers] = []
        errors: list[BaseException | None] = []
        try:
            homes: dict[Home | VramHome | None, list[Part]] = {}
            for part in order.parts:
                homes.setdefault(part.home, []).append(part)
            loads.extend(self._load(home, parts, order) for home, parts in homes.items())
            self._blend(order, loads, started + self._timeout)
        except (CairnError, RuntimeError) as error:
            errors.append(error)
        for load in loads:
            try:
                errors.append(load.end().exception())
            except CairnError as error:
                errors.append(error)
        if found := [error for error in errors if error]:
            return failed(found[0])
        done: Future[float] = Future()
        done.set_result(time.monotonic() - started)
        return done

    def learn(self, order: Learn) -> Copying:
        """Computes a chunk as if nothing stood before it, and writes its blocks to the arena, on the spot."""
        place = self._places.at(order.home)
        if place is None:
            return refused()
        over: Future[float] = Future()
        inside = place.copy(lambda *_: over, *_NOTHING)
        if inside is not over:
            return inside
        canvas = _RowsCanvas(order, self._rows(place.mover), self._layers[0].keys, self._geometry)
        try:
            blend(self._model, self._tokens(order.tokens), canvas, 0, [], Recipe((), ()))
            over.set_result(canvas.seconds)
        except (CairnError, RuntimeError) as error:
            over.set_exception(error)
        return over

    def _tokens(self, tokens: bytes) -> Any:
        found = torch.from_numpy(np.frombuffer(tokens, np.uint32).astype(np.int64))
        return found.to(self._layers[0].keys.device)

    def _blend(self, order: Blend, loads: list[Layers], deadline: float) -> None:
        device, tokens = self._layers[0].keys.device, self._tokens(order.tokens)
        moved = [part for part in order.parts if part.start >= order.start]
        rows = torch.cat([torch.arange(part.start, part.stop, device=device) for part in moved])
        origins = torch.cat(
            [torch.arange(part.stop - part.start, device=device) + part.start - part.origin for part in moved]
        )
        turn = Turn.between(self._model.rope, origins, self._model.rope, rows)
        canvas = _PagedCanvas(self._layers, order, len(tokens), loads, deadline, turn, rows)
        blend(self._model, tokens, canvas, order.start, [Piece(part.start, part.stop) for part in moved], self._recipe)

    def _load(self, home: Home | VramHome | None, parts: list[Part], order: Blend) -> Layers:
        """Starts to load parts: into the paged cache, whose pages take tokens at any slot, or else into the planes."""
        place = self._places.at(home)
        if place is None:
            raise BlendError("a chunk's rows cannot be reached: the node's arena is not mapped yet")
        block = self._geometry.block_tokens
        if any(len(part.rows) * block < part.skipped(block) + part.stop - part.start for part in parts):
            raise BlendError("some of a chunk's rows are not there any more")
        if place.mover.by_token:
            place = place.by_token()
        elif place.mover.kv.opaque:
            return _Read(place, parts, self._rows(place.mover), block)
        slots = np.concatenate([self._slots(part, order) for part in parts])
        return place.load_layers(slots, np.concatenate([part.rows for part in parts], dtype=np.int32))

    def _rows(self, mover: Mover) -> ArenaRows:
        dtype, opaque = self._layers[0].keys.dtype, mover.kv.opaque
        return ArenaRows(mover.memory, dtype, self._geometry, self._layout, opaque=opaque, quantizer=self._quantizer)

    def _slots(self, part: Part, order: Blend) -> TokenSlots:
        """Where the tokens of a part's rows belong in the paged cache; none for those that it leaves out."""
        block = self._geometry.block_tokens
        positions = np.arange(len(part.rows) * block) + part.start - part.skipped(block)
        wanted = (positions >= part.start) & (positions < part.stop)
        pages = np.asarray(order.context + order.pages, np.int64)
        at = np.where(wanted, positions, part.start)
        return np.where(wanted, pages[at // block] * block + at % block, -1)


class _Read(Layers):
    """Parts that are read from the arena, in host memory, right into a layer's planes."""

    def __init__(self, place: Place, parts: list[Part], rows: ArenaRows, block_tokens: int) -> None:
        self._over: Future[float] = Future()
        self._parts = parts
        self._rows = rows
        self._block = block_tokens
        inside = place.copy(lambda *_: self._over, *_NOTHING)
        if inside is not self._over:
            raise BlendError(f"a chunk's rows cannot be read: {inside.exception()}")

    def wait(self, layer: int, timeout: float) -> None:
        """It is there."""

    def fill(self, layer: int, planes: Planes) -> None:
        """Copies the parts' tokens into the layer's planes."""
        for part in self._parts:
            first = part.skipped(self._block)
            for plane, held in zip(planes, self._rows.read(layer, part.rows), strict=True):
                plane[part.start : part.stop] = held.flatten(0, 1)[first : first + part.stop - part.start]

    def end(self) -> Copying:
        self._over.set_result(0.0)
        return self._over


class _PagedCanvas(Canvas):
    """A prompt in the paged cache: a layer's pages are taken out, put together, and put back.

    turn: of the tokens `rows`. deadline: as time.monotonic().
    """

    def __init__(
        self,
        layers: list[Pages],
        order: Blend,
        tokens: int,
        loads: list[Layers],
        deadline: float,
        turn: Turn,
        rows: Any,
    ) -> None:
        self._layers = layers
        self._loads = loads
        self._deadline = deadline
        self._turn = turn
        self._rows = rows
        self._tokens = tokens
        device = layers[0].keys.device
        self._pages = torch.tensor(order.context + order.pages, device=device)
        self._written = slice(len(order.context), None)
        self._planes: Planes = (None, None)

    def load(self, layer: int) -> Planes:
        for load in self._loads:
            load.wait(layer, max(0.0, self._deadline - time.monotonic()))
        self._planes = tuple(plane[self._pages].flatten(0, 1) for plane in self._layers[layer])
        for load in self._loads:
            if isinstance(load, _Read):
                load.fill(layer, self._planes)
        self._turn.apply(self._planes[0], self._rows)
        keys, values = self._planes
        return keys[: self._tokens], values[: self._tokens]

    def finish(self, layer: int) -> None:
        for plane, pages in zip(self._planes, self._layers[layer], strict=True):
            whole = plane.view(-1, *pages.shape[1:])
            pages[self._pages[self._written]] = whole[self._written]


class _RowsCanvas(Canvas):
    """A chunk that is computed alone: each layer's planes go to the arena's rows as soon as they are complete.

    like: a tensor of the planes' device and dtype. seconds: how long the writing took.
    """

    def __init__(self, order: Learn, rows: ArenaRows, like: Any, geometry: KVGeometry) -> None:
        self._rows = rows
        self._order = order
        blocks = order.first + len(order.rows)
        shape = (blocks * geometry.block_tokens, geometry.kv_heads, geometry.head_dim)
        self._planes = (like.new_zeros(shape), like.new_zeros(shape))
        self._block = geometry.block_tokens
        self.seconds = 0.0

    def load(self, layer: int) -> Planes:  # noqa: ARG002 - the contract
        return self._planes

    def finish(self, layer: int) -> None:
        started = time.monotonic()
        keys, values = (plane.unflatten(0, (-1, self._block))[self._order.first :] for plane in self._planes)
        self._rows.write(layer, self._order.rows, Pages(keys, values))
        self.seconds += time.monotonic() - started
