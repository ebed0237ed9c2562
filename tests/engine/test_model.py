"""The whole engine against a model: whatever happens, what it serves was stored, and is right to the byte."""

import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from cairn.engine import CacheEngine, TaskStatus

from .pages import BLOCK, SLOTS, Pages, at_rest, make_engine


def path(length: int, fork: int, branch: int) -> npt.NDArray[np.int64]:
    """Prompts are paths in a small tree: they share prefixes, and diverge inside blocks and at their edges."""
    places = np.arange(length, dtype=np.int64)
    return places + 50 * branch * (places >= fork)


prompts = st.builds(path, st.integers(1, 40), st.sampled_from([0, 6, 12]), st.integers(0, 1))
tenants = st.sampled_from([b"", b"other"])


class EngineModel(RuleBasedStateMachine):
    """Content is a function of the tokens and the tenant, so a wrong byte, wherever it comes from, is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp(prefix="cairn-model-"))
        self.ever: set[tuple[bytes, bytes]] = set()
        self.engine: CacheEngine = None  # type: ignore[assignment]

    @initialize(dram=st.sampled_from([2, 5, 12, 40]), disk=st.booleans(), size=st.sampled_from([160_000, 1 << 20]))
    def start(self, dram: int, disk: bool, size: int) -> None:
        self.make = lambda: make_engine(dram, self.directory if disk else None, size)
        self.persistent = disk
        self.engine = self.make()

    def teardown(self) -> None:
        if self.engine:
            self.engine.close()
        shutil.rmtree(self.directory, ignore_errors=True)

    def space(self, tenant: bytes) -> Any:
        from cairn.kv import Namespace

        return Namespace(model="m", geometry=self.engine.geometry, salt=tenant)

    def remember(self, tokens: npt.NDArray[np.int64], tenant: bytes) -> None:
        for stop in range(BLOCK, len(tokens) + 1, BLOCK):
            self.ever.add((tenant, tokens[:stop].tobytes()))

    def longest_ever(self, tokens: npt.NDArray[np.int64], tenant: bytes) -> int:
        stop = 0
        while stop + BLOCK <= len(tokens) and (tenant, tokens[: stop + BLOCK].tobytes()) in self.ever:
            stop += BLOCK
        return stop

    def contents(self, tokens: npt.NDArray[np.int64], tenant: bytes) -> npt.NDArray[np.int64]:
        """Tokens that stand for these in another tenant's cache: other contents for the same prompt."""
        return tokens + 100 * len(tenant)

    @rule(tokens=prompts, tenant=tenants, asynchronous=st.booleans())
    def store(self, tokens: npt.NDArray[np.int64], tenant: bytes, asynchronous: bool) -> None:
        pages = Pages()
        slots = pages.slots(len(tokens))
        pages.prefill(self.contents(tokens, tenant), slots)
        if asynchronous:
            self.engine.register_kv_caches(pages.tensors)
            task = self.engine.put_async(tokens, slots, namespace=self.space(tenant))
            assert self.engine.wait([task])[task].status in set(TaskStatus) - {TaskStatus.TIMEOUT, TaskStatus.UNREADY}
        else:
            self.engine.store(tokens, None, pages.tensors, slots, namespace=self.space(tenant))
        self.remember(tokens, tenant)

    @rule(tokens=prompts, tenant=tenants)
    def store_layer_by_layer(self, tokens: npt.NDArray[np.int64], tenant: bytes) -> None:
        pages = Pages()
        slots = pages.slots(len(tokens))
        pages.prefill(self.contents(tokens, tenant), slots)
        kv = self.engine.register_kv_caches(pages.tensors)
        store = self.engine.store_layers(self.engine.chain(tokens, namespace=self.space(tenant)))
        if store:
            part = slots[store.first_block * BLOCK : (store.first_block + store.blocks) * BLOCK]
            for layer in range(self.engine.geometry.layers):
                store.put(layer, kv, part)
            store.commit()
        self.remember(tokens, tenant)

    @rule(tokens=prompts, tenant=tenants)
    def a_writer_gives_up(self, tokens: npt.NDArray[np.int64], tenant: bytes) -> None:
        pages = Pages()
        slots = pages.slots(len(tokens))
        kv = self.engine.register_kv_caches(pages.tensors)
        store = self.engine.store_layers(self.engine.chain(tokens, namespace=self.space(tenant)))
        if store:
            first = store.first_block * BLOCK
            store.put(0, kv, slots[first : first + store.blocks * BLOCK])
            store.abort()

    @rule(
        tokens=prompts,
        tenant=tenants,
        start=st.sampled_from([0, 0, 0, 4, 7]),
        how=st.sampled_from(["sync", "async", "layers"]),
    )
    def retrieve(self, tokens: npt.NDArray[np.int64], tenant: bytes, start: int, how: str) -> None:
        pages = Pages(5)
        slots = pages.slots(len(tokens))
        pages.clear()
        wanted = np.arange(len(tokens)) >= start
        space = self.space(tenant)
        found = self.engine.lookup(tokens, namespace=space)
        if how == "sync":
            mask = self.engine.retrieve(tokens, wanted, pages.tensors, slots, namespace=space)
        else:
            self.engine.register_kv_caches(pages.tensors)
            task, _ = self.engine.get_match(tokens, wanted, namespace=space)
            self.engine.launch([task], [slots], layerwise_transfer=how == "layers")
            mask = self.engine.wait([task])[task].mask
        assert pages.holds(self.contents(tokens, tenant), slots, mask)
        assert not (mask & ~wanted).any()
        upto = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else 0
        assert mask[min(start, upto) : upto].all()
        assert upto <= self.longest_ever(tokens, tenant)
        assert found <= self.longest_ever(tokens, tenant)

    @rule(tokens=prompts, tenant=tenants)
    def what_fits_is_found_at_once(self, tokens: npt.NDArray[np.int64], tenant: bytes) -> None:
        """With nothing else going on, a prompt that DRAM can take is held from its store on."""
        at_rest(self.engine)
        self.store(tokens, tenant, False)
        capacity = self.engine.get_stats()["tiers"]["dram"]["capacity_blocks"]  # type: ignore[index,call-overload]
        held = min(len(tokens) // BLOCK, int(capacity)) * BLOCK  # type: ignore[arg-type]
        assert self.engine.lookup(tokens, namespace=self.space(tenant)) >= held

    @rule(tokens=prompts)
    def prefetch(self, tokens: npt.NDArray[np.int64]) -> None:
        task = self.engine.prefetch_async(tokens)
        self.engine.wait([task])

    @rule(tokens=prompts)
    def forgotten_match(self, tokens: npt.NDArray[np.int64]) -> None:
        task, _ = self.engine.get_match(tokens)
        self.engine.cancel([task])

    @precondition(lambda self: self.engine and self.persistent)
    @rule()
    def restart(self) -> None:
        self.engine.close()
        self.engine = self.make()

    @precondition(lambda self: self.engine and self.persistent)
    @rule(where=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7), file=st.sampled_from(["data", "table"]))
    def a_byte_rots(self, where: float, bit: int, file: str) -> None:
        self.engine.close()
        path = self.directory / file
        content = bytearray(path.read_bytes())
        content[int(where * len(content))] ^= 1 << bit
        path.write_bytes(content)
        self.engine = self.make()

    @invariant()
    def nothing_leaks(self) -> None:
        if self.engine:
            at_rest(self.engine)


EngineModel.TestCase.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
TestEngineModel = EngineModel.TestCase
assert SLOTS >= 40
