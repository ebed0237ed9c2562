"""Draws what `cairn bench quality` found: KL over bits an element."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any


def draw(quality: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Writes a PNG or SVG, by the suffix. Codecs with no loss are left out."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    lossy = {name: one for name, one in quality.items() if one["kl"] > 1e-9}
    for label, chosen in (
        ("cachegen, calibrated", [n for n in lossy if n.startswith("cachegen") and "uncalibrated" not in n]),
        ("cachegen, uncalibrated", [n for n in lossy if "uncalibrated" in n]),
        ("fixed rate", [n for n in lossy if n in ("int4", "int8", "fp8")]),
        ("CacheGen as published", [n for n in lossy if n.startswith("published")]),
    ):
        points = sorted((lossy[name]["bits"], lossy[name]["kl"]) for name in chosen)
        if points:
            axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set_yscale("log")
    axes.set_xlabel("bits an element, everything included (16 uncompressed)")
    axes.set_ylabel("KL, nats a token")
    axes.grid(visible=True, alpha=0.3)
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
