"""`cairn bench blend` and `cairn blend check`: a real model, real texts, a real engine."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Final

from cairn.blend import Recipe
from cairn.cli.blend.measure import Score, Variants, compare, summary
from cairn.cli.blend.prompts import Rag, Shape, rag_prompts
from cairn.cli.demo.model import default_cache_dir, fetch_model
from cairn.cli.demo.show import Screen
from cairn.config import Config
from cairn.config.schema import Blending, Cpu, Engine, Storage
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
    variants: dict[str, Recipe | None] = {"full reuse": Recipe(ratios=(0.0,), check_layers=(1,), head_tokens=0)}
    for ratio in RATIOS:
        variants[f"ratio {ratio:g}"] = Recipe(defaults.check_layers, (ratio,), defaults.head_tokens)
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
    recipe = Recipe(blending.check_layers, blending.recompute_ratios, blending.head_tokens)
    prompts = rag_prompts(bench.tokenizer, count)
    found = bench.run(prompts, {"blended": recipe}, lambda done: tick(done, count))
    bench.close()
    return {"prompts": count, **found}


class _Bench:
    """A model with an engine that holds the chunks of a few prompts."""

    def __init__(self, home: Path, blending: Blending) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self._model = AutoModelForCausalLM.from_pretrained(home, dtype="float32", local_files_only=True).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(home, local_files_only=True)
        # Every variant is to be measured, whether it pays or not.
        config = Config(storage=Storage(cpu=Cpu(size=_DRAM_BYTES)), blending=blending, engine=Engine(planner=False))
        self._engine = CacheEngine(namespace_of(self._model), config)
        self._connector = CairnConnector(self._model, self._engine, self.tokenizer)
        assert self._connector.blender is not None
        self.separator = self._connector.blender.separator

    def run(self, prompts: Iterable[Rag], variants: Variants, tick: Callable[[int], None]) -> dict[str, Any]:
        scored: list[dict[str, Score]] = compare(self._model, self.tokenizer, self._connector, prompts, variants, tick)
        return {name: summary([scores[name] for scores in scored]) for name in variants}

    def close(self) -> None:
        self._connector.close()
        self._engine.close()
