"""Hugging Face Transformers: a `Cache` that starts with every stored prefix of its prompt and stores what is new.

    with CairnConnector.open(model, disk_path="cache") as cairn, cairn.cache(inputs.input_ids) as cache:
        model.generate(**inputs, past_key_values=cache)

No code of Transformers is patched: the connector registers two of torch's own module hooks on the model, through which
a cache learns which tokens the model is given, and wraps `prepare_inputs_for_generation` of this one model, where
`generate` takes the cached tokens off. So KV is stored under no other tokens than those it was computed from, and a
cache that was made for another prompt is refused instead of answering for it. (Who calls the model himself, with what
follows the cached tokens alone, or `generate` with `prefill_chunk_size`, answers for the tokens before.)
"""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch

from cairn.config import Config
from cairn.config.schema import Blending, Cpu, Disk, Storage
from cairn.connect.hf_blend import Blender
from cairn.connect.hf_cache import CairnCache
from cairn.connect.hf_model import decoder_of, namespace_of, refuse_model
from cairn.engine import CacheEngine
from cairn.errors import CairnError, GeometryError, InputError
from cairn.kv import as_tokens

#: By this method of a model `generate` takes what is cached off its tokens.
_PREPARE = "prepare_inputs_for_generation"

__all__ = ["CairnCache", "CairnConnector", "namespace_of"]


class CairnConnector:
    """One model and one engine. Made once and used for every request; a context manager.

    The engine stays the caller's (`open` makes one that is the connector's). Thread-safe as far as the model is. With
    `blending.enabled` in the engine's config, chunks are reused wherever they stand in a prompt; `tokenizer`, the
    model's, tells the tokens of `blending.special_str`. Raises GeometryError for models whose KV a prefix cache cannot
    hold, or that do not fit the engine or blending.
    """

    def __init__(self, model: Any, engine: CacheEngine, tokenizer: Any = None) -> None:
        refuse_model(model)
        own = namespace_of(model, revision="unchecked", block_tokens=engine.geometry.block_tokens).geometry
        if own != engine.geometry:
            raise GeometryError(f"{type(model).__name__} has {own}, the engine {engine.geometry}: must be equal")
        self.engine = engine
        engine.cost.recompute.masks = getattr(model.config, "_attn_implementation", None) == "sdpa"
        self._owns_engine = False
        self._dtype = model.dtype
        self.blender = Blender(model, engine, tokenizer) if engine.config.blending.enabled else None
        body = decoder_of(model)
        self._parameters = inspect.signature(body.forward)
        self._hooks = (
            body.register_forward_pre_hook(self._before_pass, with_kwargs=True),
            body.register_forward_hook(self._after_pass, with_kwargs=True),
        )
        self._model = model
        self._closed = False
        self._looks = self._before = None
        if hasattr(model, _PREPARE):
            self._before = vars(model).get(_PREPARE)
            self._looks = model.prepare_inputs_for_generation = self._looking(getattr(model, _PREPARE))

    @classmethod
    def open(
        cls,
        model: Any,
        *,
        dram_bytes: int = 1 << 30,
        disk_path: Path | str | None = None,
        disk_bytes: int = 16 << 30,
        name: str | None = None,
        revision: str | None = None,
        salt: bytes = b"",
        blending: Blending | None = None,
        tokenizer: Any = None,
    ) -> Self:
        """A connector with an engine of its own, whose namespace is that of the model (see `namespace_of`)."""
        disk = Disk(path=Path(disk_path), size=disk_bytes) if disk_path is not None else Disk()
        storage = Storage(cpu=Cpu(size=dram_bytes), disk=disk)
        config = Config(storage=storage, blending=blending or Blending())
        namespace = namespace_of(
            model, name=name, revision=revision, salt=salt, block_tokens=config.engine.block_tokens
        )
        engine = CacheEngine(namespace, config)
        try:
            connector = cls(model, engine, tokenizer)
        except CairnError:
            engine.close()
            raise
        connector._owns_engine = True
        return connector

    def cache(self, input_ids: Any) -> CairnCache:
        """A cache for one prompt (token ids [n] or [1, n]), to be given to `generate` as `past_key_values` with it.

        Brings up what is stored of the prompt, within the engine's deadline. Raises InputError for other shapes.
        """
        try:
            tokens = np.asarray(input_ids)
        except ValueError:
            raise InputError("input_ids in rows of different lengths: a CairnCache serves one sequence") from None
        if tokens.ndim == 2 and tokens.shape[0] != 1:
            raise InputError(f"input_ids of shape {tokens.shape}: a CairnCache serves one sequence; make one for each")
        tokens = as_tokens(tokens[0] if tokens.ndim == 2 else tokens)
        if not len(tokens):
            raise InputError("input_ids without a token: a prompt has at least one")
        return CairnCache(self.engine, torch.from_numpy(tokens.astype(np.int64)), self._dtype, self, self.blender)

    def learn(self, tokens: Any) -> int:
        """Computes a chunk and stores it, so that prompts which have it between separators can be blended with it.

        tokens: its ids [n]. Returns how many tokens are new. Raises InputError unless blending is enabled.
        """
        if self.blender is None:
            raise InputError("blending.enabled is false: chunks are learnt to be blended; set it to true")
        return self.blender.learn(tokens)

    def close(self) -> None:
        """Takes the hooks off the model, and closes the engine if it is the connector's own. Idempotent."""
        for hook in self._hooks:
            hook.remove()
        self._closed = True
        if self._looks is not None and vars(self._model).get(_PREPARE) is self._looks:
            before = self._before
            while (other := getattr(before, "connector", None)) and other._closed:  # it was closed first
                before = other._before
            if before is None:
                delattr(self._model, _PREPARE)
            else:
                setattr(self._model, _PREPARE, before)
        if self._owns_engine:
            self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _looking(self, prepare: Callable[..., Any]) -> Callable[..., Any]:
        """As `prepare`, but the cache sees all tokens before."""

        @functools.wraps(prepare)
        def looking(input_ids: Any, *args: Any, **kwargs: Any) -> Any:
            cache = kwargs.get("past_key_values")
            cut = kwargs.get("next_sequence_length") is not None
            if cut and isinstance(cache, CairnCache) and cache.owner is self and not self._closed:
                cache.begin_generation(input_ids)
            return prepare(input_ids, *args, **kwargs)

        vars(looking)["connector"] = self
        return looking

    def _before_pass(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache, arguments = self._cache_of(args, kwargs)
        if cache is not None:
            if module.training:
                raise InputError("the model is in training mode, whose KV is random (dropout); call model.eval()")
            cache.begin_pass(arguments)

    def _after_pass(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any) -> None:
        cache, _ = self._cache_of(args, kwargs)
        if cache is not None:
            cache.end_pass()

    def _cache_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[CairnCache | None, dict[str, Any]]:
        arguments = self._parameters.bind_partial(*args, **kwargs).arguments if args else kwargs
        cache = arguments.get("past_key_values")
        return (cache if isinstance(cache, CairnCache) and cache.owner is self else None), arguments
