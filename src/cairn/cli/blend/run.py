"""`cairn bench blend` and `cairn blend check`: a real model, real texts, a real engine."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from cairn.blend import ChunkStore, Recipe
from cairn.cli.blend.measure import Variants, compare, summary
from cairn.cli.blend.prompts import Rag, Shape, rag_prompts
from cairn.cli.demo.model import default_cache_dir, fetch_model
from cairn.cli.demo.show import Screen
from cairn.config import Config
from cairn.config.schema import Blending, Cpu, Engine, Storage
from cairn.connect.hf_blend import Blender
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine

RATIOS: Final = (0.0, 0.05, 0.15, 0.3, 1.0)
#: 8 chunks of 490 tokens: with system prompt and question 4,096 tokens.
LONG: Final = Shape(chunks=(8, 8), tokens=(490, 490))
_DRAM_BYTES: Final = 1 << 29

Tick = Callable[[int, int], None]


def run_blend(model_dir: Path | None, count: int, long: int, tick: Tick) -> dict[str, Any]:
    """Quality over `count` prompts, and times over `long` ones of 4k tokens. Raises InputError and StorageError."""
    bench = _Bench(model_dir or fetch_model(default_cache_dir(), Screen()), Blending(enabled=True))
    defaults = Blending()
    nothing = Recipe(ratios=(0.0,), head_tokens=0)
    variants: dict[str, Blender | None] = {
        "full reuse": bench.blender(nothing, prelude=False),
        "full reuse, prelude": bench.blender(nothing),
    }
    for ratio in RATIOS:
        recipe = Recipe(defaults.check_layers, (ratio,), defaults.head_tokens)
        variants[f"ratio {ratio:g}"] = bench.blender(recipe)
    variants["prefix only"] = None
    prompts = list(rag_prompts(bench.tokenizer, count))
    result: dict[str, Any] = {"prompts": count, "recipe": defaults.model_dump(mode="json")}
    result["quality"] = bench.run(prompts, variants, lambda done: tick(done, count + long))
    if long:
        prompts = list(rag_prompts(bench.tokenizer, long, LONG, seed=1))
        found = bench.run(prompts, variants, lambda done: tick(count + done, count + long))
        result["long"] = {name: {key: row[key] for key in ("ttft_share", "hit_share")} for name, row in found.items()}
        result["long_tokens"] = sum(len(rag.ids(bench.separator)) for rag in prompts) // long
    bench.close()
    return result


def run_check(model_dir: Path, blending: Blending, count: int, tick: Tick) -> dict[str, Any]:
    """The answers of one model by these settings, enabled or not. Raises GeometryError for a model that has none."""
    bench = _Bench(model_dir, blending.model_copy(update={"enabled": True}))
    prompts = rag_prompts(bench.tokenizer, count)
    variants = {"blended": bench.blender(Recipe.of(blending))}
    found = bench.run(prompts, variants, lambda done: tick(done, count))
    bench.close()
    return {"prompts": count, **found}


class _Bench:
    """A model with an engine that holds the chunks of a few prompts."""

    def __init__(self, home: Path, blending: Blending) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(home, dtype="float32", local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
        # Every variant is to be measured, whether it pays or not: without a planner what is held is loaded.
        config = Config(storage=Storage(cpu=Cpu(size=_DRAM_BYTES)), blending=blending, engine=Engine(planner=False))
        self._engine = CacheEngine(namespace_of(self._model), config)
        self._connector = CairnConnector(self._model, self._engine, self.tokenizer)
        self.separator = self.blender(Recipe()).separator

    def blender(self, recipe: Recipe, *, prelude: bool = True) -> Blender:
        """One that blends by `recipe`. prelude: False: chunks are computed with nothing before them, as published."""
        made = Blender(self._model, self._engine, self.tokenizer)
        made.recipe = recipe
        if not prelude:
            made.chunks = ChunkStore(self._engine, made.chunks.rope)
        return made

    def run(self, prompts: Iterable[Rag], variants: Variants, tick: Callable[[int], None]) -> dict[str, Any]:
        scored = compare(self._model, self.tokenizer, self._connector, prompts, variants, tick)
        return {name: summary([scores[name] for scores in scored]) for name in variants}

    def close(self) -> None:
        self._connector.close()
        self._engine.close()
