"""`cairn bench quality`: every algorithm and level on one real model, by real bytes."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cairn.cli.demo.model import NAME, fetch_model, open_model
from cairn.cli.demo.show import Screen
from cairn.cli.quality.measure import Score, Subject, codec_subject, quantizer_subject, scores, summary
from cairn.cli.quality.published import Published
from cairn.cli.quality.texts import CONTEXT, SCORED, windows
from cairn.codec.base import SINK_TOKENS
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration, shipped
from cairn.codec.fixed import Fp8, Int4, Int8
from cairn.codec.levels import LEVELS, Level
from cairn.codec.lossless import Lossless
from cairn.codec.quantized import Quantizer
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
    for name in ("int8", "int4"):
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
    tick: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Takes a minute a window on two cores. Raises InputError and StorageError as its parts do."""
    from cairn.cli.demo.model import default_cache_dir
    from cairn.connect.hf_model import geometry_of

    home = model_dir or fetch_model(default_cache_dir(), Screen())
    model, tokenizer = open_model(home)
    g = geometry_of(model)
    geometry = KVGeometry(layers=g.layers, kv_heads=g.kv_heads, head_dim=g.head_dim, dtype="bfloat16")
    known = Calibration.load(calibration) if calibration else shipped(NAME) if home.name == NAME else None
    compared, scored = subjects(geometry, known), []
    wanted = windows(tokenizer, count)
    for i, window in enumerate(wanted):
        scored.append(scores(model, window, compared))
        if tick:
            tick(i + 1, len(wanted))
    return report(scored, [window.source for window in wanted])


def report(scored: Sequence[dict[str, Score]], sources: Sequence[str]) -> dict[str, Any]:
    """What `scores` found in each window, as figures."""
    return {
        "scored_tokens": len(scored) * SCORED,
        "context_tokens": CONTEXT,
        "texts": {source: sources.count(source) for source in dict.fromkeys(sources)},
        "quality": {name: summary([window[name] for window in scored]) for name in scored[0]},
    }
