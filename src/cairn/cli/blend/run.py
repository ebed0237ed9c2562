"""`cairn bench blend` and `cairn blend check`: a real model, real texts, a real engine."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from cairn.blend import ChunkStore, Recipe
from cairn.blend.checked import Checked
from cairn.cli.blend.measure import ANSWER, Score, Variants, compare, quality
from cairn.cli.blend.prompts import Rag, Shape, rag_prompts
from cairn.cli.blend.sheet import BASES, Sheet
from cairn.cli.demo.model import default_cache_dir, fetch_model, open_model
from cairn.cli.demo.show import Screen
from cairn.config import Config
from cairn.config.schema import Blending, Cpu, Engine, Storage
from cairn.connect.hf_blend import Blender
from cairn.connect.transformers import CairnConnector, namespace_of
from cairn.engine import CacheEngine

RATIOS: Final = (0.0, 0.05, 0.15, 0.3, 1.0)
#: 8 chunks of 490 tokens: with system prompt and question 4,096 tokens.
LONG: Final = Shape(chunks=(8, 8), tokens=(490, 490), documents=8)
#: Layers to check at, the cheapest first.
CANDIDATES: Final = (1, 3, 6)
#: Variants that are asked every so many prompts only.
_EVERY: Final = {"ratio 0.15, check layer 1": 4, "ratio 0.15, check layer 6": 4}
#: Chunks of two kinds and some whole prompts.
_ROOM: Final = 3
#: Nothing is given up because the run was stopped for a while, as by SIGSTOP.
_PATIENCE_S: Final = 86_400.0

Tick = Callable[[int, int], None]


def run_blend(
    model_dir: Path | None, count: int, tokens: int, long: int, out: Path | None, tick: Tick
) -> dict[str, Any]:
    """Quality over `count` prompts of about so many tokens, and times over `long` ones of 4k.

    out: where the result is after every prompt, and what a run goes on from that was stopped, or lacked variants.
    Raises InputError, StorageError.
    """
    home, shape, default = model_dir or fetch_model(default_cache_dir(), Screen()), Shape.about(tokens), Recipe()
    asked = {"model": home.name, "recipe": _settings(default), "tokens": tokens, "answer": ANSWER}
    sheet = Sheet(out, asked)
    bench = _Bench(home, Blending(), [shape, LONG])
    nothing = Recipe(ratios=(0.0,), head_tokens=0)
    variants: dict[str, Blender | None] = {
        BASES[0]: bench.blender(nothing, prelude=False),
        BASES[1]: bench.blender(nothing),
    }
    for ratio in RATIOS:
        variants[f"ratio {ratio:g}"] = bench.blender(default._replace(ratios=(ratio,)))
    for layer in sorted(set(CANDIDATES) - set(default.check_layers)):
        variants[f"ratio 0.15, check layer {layer}"] = bench.blender(Recipe((layer,)))
    variants["prefix only"] = None
    for i, rag in bench.prompts(count, shape):
        some = {name: blender for name, blender in variants.items() if i % _EVERY.get(name, 1) == 0}
        if lacking := sheet.lacking("quality", i, some):
            sheet.add("quality", i, bench.score(rag, lacking, i))
            tick(i + 1, count + long)
    for i, rag in bench.prompts(long, LONG):
        if lacking := sheet.lacking("long", i, variants):
            sheet.add("long", i, bench.score(rag, lacking, i))
            tick(count + i + 1, count + long)
    bench.close()
    return sheet.result()


def _settings(recipe: Recipe) -> dict[str, Any]:
    return Blending(check_layers=recipe.check_layers, recompute_ratios=recipe.ratios).model_dump(mode="json")


def run_check(
    model_dir: Path, blending: Blending, count: int, most_kl: float, tick: Tick
) -> tuple[Checked, dict[str, Any]]:
    """The answers of one model by these settings, enabled or not; where `check_layers` says nothing, by some layers.

    Returns what is to be kept of it, and the figures. Raises GeometryError for a model that has none.
    """
    shape = Shape.about(1000, documents=max(8, count))
    bench = _Bench(model_dir, blending, [shape])
    tried = [blending.check_layers] if blending.check_layers else [(n,) for n in CANDIDATES if n < bench.layers]
    recipes = {_name(layers): Recipe(layers, blending.recompute_ratios, blending.head_tokens) for layers in tried}
    variants = {name: bench.blender(recipe) for name, recipe in recipes.items()}
    scores = []
    for i, rag in bench.prompts(count, shape):
        scores.append(bench.score(rag, variants, i))
        tick(i + 1, count)
    bench.close()
    figures = {name: quality([one[name] for one in scores]) for name in variants}
    kl = {recipe.check_layers: figures[name]["kl_95"][1] for name, recipe in recipes.items()}
    return Checked.of(blending, most_kl, kl), figures


def _name(layers: tuple[int, ...]) -> str:
    return f"check layer {', '.join(map(str, layers))}"


class _Bench:
    """A model with an engine that holds all documents of prompts of these shapes."""

    def __init__(self, home: Path, blending: Blending, shapes: Sequence[Shape]) -> None:
        self._model, self.tokenizer = open_model(home)
        namespace = namespace_of(self._model)
        # Every variant is to be measured, whether it pays or not: without a planner what is held is loaded.
        size = _ROOM * namespace.geometry.token_bytes * sum(shape.documents * shape.tokens[1] for shape in shapes)
        disabled = blending.model_copy(update={"enabled": False})  # of the connector itself
        engine = Engine(planner=False, timeout_s=_PATIENCE_S, lease_s=_PATIENCE_S)
        config = Config(storage=Storage(cpu=Cpu(size=size)), blending=disabled, engine=engine)
        self._engine = CacheEngine(namespace, config)
        self.layers = namespace.geometry.layers
        self._connector = CairnConnector(self._model, self._engine, self.tokenizer)

    def blender(self, recipe: Recipe, *, prelude: bool = True) -> Blender:
        """One that blends by `recipe`. prelude: False: chunks are computed with nothing before them, as published."""
        made = Blender(self._model, self._engine, self.tokenizer, recipe)
        if not prelude:
            made.chunks = ChunkStore(self._engine, made.chunks.rope)
        return made

    def prompts(self, count: int, shape: Shape) -> Iterator[tuple[int, Rag]]:
        """Numbered."""
        return enumerate(rag_prompts(self.tokenizer, count, shape))

    def score(self, rag: Rag, variants: Variants, turn: int) -> dict[str, Score]:
        scores: dict[str, Score] = compare(self._model, self.tokenizer, self._connector, rag, variants, turn)
        return scores

    def close(self) -> None:
        self._connector.close()
        self._engine.close()
