"""`cairn bench quality`: every algorithm and level on one real model, by real bytes."""

from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from functools import cache, partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from cairn.cli.demo.model import NAME, fetch_model, open_model
from cairn.cli.demo.show import Screen
from cairn.cli.quality.measure import Score, Subject, codec_subject, quantizer_subject, scores, summary
from cairn.cli.quality.published import Published
from cairn.cli.quality.texts import CONTEXT, SCORED, Window, windows
from cairn.codec.base import SINK_TOKENS
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration, shipped
from cairn.codec.fixed import Fp8, Int4, Int8
from cairn.codec.levels import LEVELS, Level
from cairn.codec.lossless import Lossless
from cairn.codec.quantized import Quantizer
from cairn.errors import InputError
from cairn.kv import KVGeometry

#: 20,480 scored tokens.
WINDOWS: Final = 80


def subjects(geometry: KVGeometry, calibration: Calibration | None) -> dict[str, Subject]:
    """What is compared, by name; lossy codecs first."""
    found: dict[str, Subject] = {}
    for name, level in LEVELS.items():
        if calibration:
            found[f"cachegen {name}"] = _cachegen(geometry, level, calibration)
        found[f"cachegen {name}, uncalibrated"] = _cachegen(geometry, level, None)
    for kind in (Int8, Fp8, Int4):
        fixed = kind(geometry)
        found[fixed.id] = codec_subject(
            lambda rows, first, fixed=fixed: fixed.encode(rows, sinks=SINK_TOKENS if first else 0),  # type: ignore[misc]
            fixed,
        )
    for name in ("int8", "fp8", "int4"):
        found[f"{name} rows"] = quantizer_subject(Quantizer(geometry, name))
    found["published CacheGen"] = lambda kv, first: Published().run(kv)  # noqa: ARG005
    lossless = Lossless(geometry)
    found["lossless"] = codec_subject(lambda rows, first: lossless.encode(rows), lossless)  # noqa: ARG005
    return found


def _cachegen(geometry: KVGeometry, level: Level, calibration: Calibration | None) -> Subject:
    codec = CacheGen(geometry, level, calibration)
    return codec_subject(lambda rows, first: codec.encode(rows, sinks=SINK_TOKENS if first else 0), codec)


def run_quality(
    model_dir: Path | None,
    *,
    count: int = WINDOWS,
    calibration: Path | None = None,
    jobs: int = 1,
    only: str = "",
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Takes a minute a window on two cores. jobs: processes that share the windows, each with a model of its own and
    one thread. only: what the names of those compared contain. Raises InputError and StorageError as its parts do.
    """
    from cairn.cli.demo.model import default_cache_dir

    home = model_dir or fetch_model(default_cache_dir(), Screen())
    _, tokenizer = open_model(home)
    wanted = windows(tokenizer, count)
    score = partial(_scores, home, calibration, only, 1 if jobs > 1 else 0)
    scored = []
    with ProcessPoolExecutor(jobs, get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        for found in pool.map(score, wanted) if pool else map(score, wanted):
            scored.append(found)
            if tick:
                tick(len(scored), len(wanted))
    return report(scored, [window.source for window in wanted])


def _scores(home: Path, calibration: Path | None, only: str, threads: int, window: Window) -> dict[str, Score]:
    """One window, in whichever process. threads: of torch; 0 leaves it its own choice."""
    model, compared = _opened(home, calibration, only, threads)
    found: dict[str, Score] = scores(model, window, compared)  # inference_mode has no types
    return found


@cache
def _opened(home: Path, calibration: Path | None, only: str, threads: int) -> tuple[Any, dict[str, Subject]]:
    """The model and what is compared on it, opened once a process. Raises InputError where nothing is."""
    import torch

    from cairn.connect.hf_model import geometry_of

    if threads:
        torch.set_num_threads(threads)
    model, _ = open_model(home)
    g = geometry_of(model)
    geometry = KVGeometry(layers=g.layers, kv_heads=g.kv_heads, head_dim=g.head_dim, dtype="bfloat16")
    known = Calibration.load(calibration) if calibration else shipped(NAME) if home.name == NAME else None
    compared = subjects(geometry, known)
    chosen = {name: subject for name, subject in compared.items() if only in name}
    if not chosen:
        raise InputError(f"--only {only!r}: in no name; name a part of one of {', '.join(compared)}")
    return model, chosen


def report(scored: Sequence[dict[str, Score]], sources: Sequence[str]) -> dict[str, Any]:
    """What `scores` found in each window, as figures."""
    return {
        "scored_tokens": len(scored) * SCORED,
        "context_tokens": CONTEXT,
        "texts": {source: sources.count(source) for source in dict.fromkeys(sources)},
        "quality": {name: summary([window[name] for window in scored]) for name in scored[0]},
    }
