"""The cache of one prompt: a Transformers `Cache` that loads its prefix from a CacheEngine and stores what is new."""

import logging
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from transformers.cache_utils import Cache

from cairn.connect.hf_blend import Blended, Blender
from cairn.connect.hf_history import History
from cairn.connect.hf_layer import GrowingLayer, Tensors
from cairn.copy import PagedKV, TokenSlots
from cairn.engine import CacheEngine, LayerLoad, LayerStore, Stage
from cairn.errors import CairnError, ClosedError, InputError
from cairn.kv import as_tokens
from cairn.observe.log import log_once
from cairn.observe.reasons import Reason

logger = logging.getLogger(__name__)

#: Tokens that a cache has room for beyond its prompt before its buffers grow.
ROOM_TOKENS = 256
#: A layer's copy out of DRAM takes milliseconds; one that takes this long will not come.
LAYER_TIMEOUT_S = 30.0


class CairnCache(Cache):  # type: ignore[misc]
    """The KV cache of one prompt, as `generate` wants it. Made by `CairnConnector.cache`; owned by one request.

    It begins with the stored prefix, of which each layer is waited for only when the model comes to it, and leaves at
    least one token to compute. New whole blocks of the prompt are stored when its first token is out, or as the model
    passes, as the engine's autopilot decides; those of the answer when `finish` is called or the context manager is
    left, so that the next turn finds them too. Crop, beams, several samples of one prompt and chunked prefill work, as
    does assisted decoding, for which Transformers computes the whole prompt whatever its cache holds; of several
    sequences only the prompt is stored.

    A failure in Cairn turns it into a plain cache (counted, logged once). InputError comes up in the forward pass when
    a cache that began with a prefix is used with another prompt, a padding mask or positions of the caller's own: then
    the prefix would be the wrong one. A cache that began empty only stores nothing in that case.
    """

    def __init__(
        self,
        engine: CacheEngine,
        prompt: torch.Tensor,
        dtype: torch.dtype,
        owner: object,
        blender: Blender | None = None,
    ) -> None:
        """prompt: int64 [n] on the CPU; dtype: the model's; owner: the connector, whose hooks feed this cache; blender:
        of its model, if prompts are to be blended.
        """
        self.owner = owner
        self.reused_tokens = 0
        self.blended: Blended | None = None
        self.reused_by_tier: dict[str, int] = {}
        self.stored_tokens = 0
        self._engine = engine
        self._geometry = geometry = engine.geometry
        self._dtype = dtype
        self._chain = engine.chain(prompt.numpy())
        shape = (1, geometry.kv_heads, len(prompt) + ROOM_TOKENS, geometry.head_dim)
        self._buffers: list[Tensors] = [
            (torch.empty(shape, dtype=dtype), torch.empty(shape, dtype=dtype)) for _ in range(geometry.layers)
        ]
        super().__init__(layers=[GrowingLayer(buffers) for buffers in self._buffers])
        self._kv = PagedKV.from_tensors(self._buffers, "transformers", geometry)
        self._stage: Stage | None = None
        self._load: LayerLoad | None = None
        self._store: LayerStore | None = None
        self._history = History(prompt, 0)
        self._past = self._pass_tokens = 0
        self._started = self._waited_s = 0.0
        self._while_computing: bool | None = None  # whether the prompt is stored as it is computed; None: undecided
        self._blender = blender
        self._exact = sys.maxsize
        with self._harmless():
            self._begin_load(prompt)
            if blender is not None:
                self._blend(blender, prompt)
        if not self.reused_tokens or self._load is None:
            self._release()

    @property
    def loaded_bytes(self) -> int:
        """KV bytes that were copied in."""
        return (self.reused_tokens + (self.blended.reused if self.blended else 0)) * self._geometry.token_bytes

    @property
    def stored_bytes(self) -> int:
        """KV bytes that were copied out."""
        return self.stored_tokens * self._geometry.token_bytes

    # --- what Transformers calls ---------------------------------------------------------------------------------

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> Tensors:
        """Appends one layer's new K and V [batch, heads, new, dim]; returns all of them."""
        if self._load is not None:
            self._await_layer(self._load, layer_idx)
        keys, values = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self._history.trusted and keys.shape[-2] != self._history.length:
            self._distrust("tokens that its connector did not see")
        if self._store is not None:
            self._put(self._store, layer_idx)
        return keys, values

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets the last `-tokens_to_remove` tokens; a positive number is the length to keep (older Transformers)."""
        self._settle()
        length = int(self.get_seq_length())
        kept = min(length, tokens_to_remove) if tokens_to_remove > 0 else max(0, length + tokens_to_remove)
        # A pass that was interrupted has been through some of the layers only: what the others lack is no token.
        kept = min(kept, *(layer.get_seq_length() for layer in self.layers))
        for layer in self.layers:
            if kept < layer.get_seq_length():
                layer.crop(kept - layer.get_seq_length())
        self._history.crop(kept)

    def reset(self) -> None:
        """Forgets everything, the prefix too."""
        self._settle()
        super().reset()
        self._exact = sys.maxsize
        self._history = History(self._history.prompt, 0)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Beam search: row i continues beam `beam_idx[i]`."""
        self._settle()
        self._history.single = False
        super().reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Several sequences from now on."""
        self._settle()
        self._history.single = False
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Other sequences from now on."""
        self._settle()
        self._history.single = False
        super().batch_select_indices(indices)

    # --- what the connector's hooks call -------------------------------------------------------------------------

    def begin_generation(self, ids: torch.Tensor) -> None:
        """Of these tokens [batch, all] the model is about to be given those behind the cached ones: the only moment
        at which the others are seen."""
        if self._history.began_with and not self._history.begins(ids):
            self._distrust("another prompt than it was made for")

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        """A forward pass with these arguments begins: learns which tokens it adds, and opens a store for those whole
        blocks of the prompt that it completes."""
        self._abort_store()
        self._past, self._pass_tokens = int(self.get_seq_length()), 0
        if self._while_computing is False and self._past >= len(self._history.prompt):
            self._store_behind()
        self._started, self._waited_s = time.perf_counter(), 0.0
        if self._history.is_given_whole(arguments):
            self._forgo_prefix()
            self._past = 0
        history = self._history
        if not history.trusted:
            self._distrust("a prompt after it was refused, or after its prefix did not come")
            return
        wrong = history.add(arguments, self._past)
        if wrong:
            self._distrust(wrong)
        elif self._past < len(history.prompt):
            self._pass_tokens = history.length - self._past
            with self._harmless():
                if self._while_computing is None:
                    awaited, ask = self._engine.config.engine.enable_disagg_pd, self._engine.autopilot
                    self._while_computing = ask.store_while_computing(self._pass_tokens, awaited=awaited)
                if history.single and self._while_computing:
                    stop = min(history.length, len(history.prompt), self._exact) // self._geometry.block_tokens
                    self._store = self._engine.store_layers(self._chain, 0, stop)

    def end_pass(self) -> None:
        """The pass is over: what it stored can be found from now on."""
        store, self._store = self._store, None
        seconds = time.perf_counter() - self._started - self._waited_s
        with self._harmless():
            if store is not None:
                self.stored_tokens += store.commit() * self._geometry.block_tokens
            if self._pass_tokens:
                self._engine.observe_prefill(self._pass_tokens, self._past, seconds)

    # --- what the caller calls -----------------------------------------------------------------------------------

    def finish(self) -> int:
        """Stores what is whole and not stored yet, the answer's blocks above all; returns how many tokens are new.

        With blending, also computes and stores the chunks that were not held: they take a prefill more, once. The
        cache can still be used afterwards, and finished again. Never raises for what happens inside.
        """
        new = 0
        with self._harmless():
            self._settle()
            new = self._store_all(self._history.tokens()[: self._exact]) * self._geometry.block_tokens
            new += self._learn()
        self.stored_tokens += new
        return new

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.finish()

    def __del__(self) -> None:
        if hasattr(self, "_history"):
            self._abort_store()
            self._release()

    # --- loading -------------------------------------------------------------------------------------------------

    def _begin_load(self, prompt: torch.Tensor) -> None:
        self._engine.seek(self._chain)
        stage = self._stage = self._engine.stage(self._chain)
        held = min(stage.wait(), len(self._chain) * self._geometry.block_tokens)
        if not held:
            return
        # The last token of the prompt is always computed: its logits are what the request is about.
        reused = min(held, len(prompt) - 1)
        slots = np.arange(held, dtype=np.int64)
        if self._engine.autopilot.layerwise(held):
            self._load = stage.load_layers(self._kv, slots)
        else:
            reused = min(stage.copy_to(self._kv, slots), reused)
        for layer, buffers in zip(self.layers, self._buffers, strict=True):
            layer.adopt(buffers, reused)
        self._history = History(prompt, reused)
        self.reused_by_tier = stage.tokens_by_tier(0, reused)
        self.reused_tokens = reused

    def _blend(self, blender: Blender, prompt: torch.Tensor) -> None:
        """Goes on behind the prefix with the prompt's chunks, as far as that pays."""
        self.blended = blended = blender.fill(
            as_tokens(prompt), self.reused_tokens, self._kv, self._buffers, self._load, self._stage
        )
        if not blended.reused:
            return
        self._exact = blended.exact
        for layer, buffers in zip(self.layers, self._buffers, strict=True):
            layer.adopt(buffers, blended.stop)
        self._history = History(prompt, blended.stop)

    def _learn(self) -> int:
        """Stores the prompt's chunks that were not held; returns how many tokens are new."""
        if self._blender is None or self.blended is None:
            return 0
        missing, self.blended = self.blended.missing, self.blended._replace(missing=[])
        return sum(map(self._blender.learn, missing))

    def _await_layer(self, load: LayerLoad, layer: int) -> None:
        started = time.perf_counter()
        there = load.wait(layer, LAYER_TIMEOUT_S)
        self._waited_s += time.perf_counter() - started
        if not there:
            self._history.trusted = False  # whoever goes on all the same would go on behind nothing
            self._release()
            raise CairnError(f"layer {layer} of the prefix did not come within {LAYER_TIMEOUT_S:.0f} s; ask again")
        if layer == len(self.layers) - 1:
            self._release()

    # --- storing -------------------------------------------------------------------------------------------------

    def _store_behind(self) -> None:
        """Stores the prompt, whose first token is out."""
        self._while_computing = None
        with self._harmless():
            tokens = self._history.tokens()[: min(len(self._history.prompt), self._exact)]
            self.stored_tokens += self._store_all(tokens) * self._geometry.block_tokens

    def _put(self, store: LayerStore, layer: int) -> None:
        with self._harmless():
            if self.layers[layer].buffers is not self._buffers[layer]:
                raise InputError(f"layer {layer}: the model's KV is no single sequence of {self._dtype}")
            store.put(layer, self._kv, self._slots(store))

    def _store_all(self, tokens: torch.Tensor) -> int:
        """Stores all whole blocks of `tokens`, which the cache holds, that are not stored; returns how many."""
        length = self._history.length
        kinds = {(layer.get_seq_length(), layer.keys.dtype, layer.values.dtype) for layer in self.layers}
        if kinds != {(length, self._dtype, self._dtype)}:
            return 0
        store = self._store = self._engine.store_layers(self._engine.chain(tokens.numpy()))
        if store is None:
            return 0
        planes = [(layer.keys[:1], layer.values[:1]) for layer in self.layers]
        kv = PagedKV.from_tensors(planes, "transformers", self._geometry)
        for layer in range(len(planes)):
            store.put(layer, kv, self._slots(store))
        self._store = None
        return store.commit()

    def _slots(self, store: LayerStore) -> TokenSlots:
        block = self._geometry.block_tokens
        return np.arange(store.first_block * block, (store.first_block + store.blocks) * block, dtype=np.int64)

    # --- when something is not as it should be -------------------------------------------------------------------

    def _distrust(self, what: str) -> None:
        """The cache holds, or is about to hold, other KV than its tokens say."""
        self._history.trusted = False
        self._abort_store()
        if self._history.began_with:
            raise InputError(f"a CairnCache was used with {what}: make one for each prompt, from the same input_ids")

    def _forgo_prefix(self) -> None:
        """The model is given the whole prompt all the same (assisted decoding does so): then it computes all of it."""
        self.reset()
        self.reused_tokens, self.reused_by_tier = 0, {}

    def _settle(self) -> None:
        """Ends what is under way: a load is waited for, a store given up."""
        self._abort_store()
        if self._load is not None:
            self._await_layer(self._load, len(self.layers) - 1)

    def _abort_store(self) -> None:
        store, self._store = self._store, None
        if store is not None:
            store.abort()

    def _release(self) -> None:
        """Stops a load under way and gives its blocks back."""
        stage, self._stage, self._load = self._stage, None, None
        if stage is not None:
            stage.release()

    @contextmanager
    def _harmless(self) -> Iterator[None]:
        """What fails in here fails alone: the request goes on without it."""
        try:
            yield
        except Exception as error:  # noqa: BLE001 - the model's forward pass must not end for it: counted, logged
            self._abort_store()
            log_once(logger, type(error).__name__, f"a prefix was not reused or not stored: {error!r}")
            reason = Reason.CLOSED if isinstance(error, ClosedError) else Reason.INTERNAL
            self._engine.metrics.failures.add(1, tier="engine", reason=reason)
