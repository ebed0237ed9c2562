"""Measures what `cairn.codec.calibration` holds: how much KL a model pays for noise in each plane of its KV."""

from collections.abc import Callable
from typing import Any, Final

import msgspec
import numpy as np

from cairn.cli.quality.measure import CHUNK, Subject, codec_subject, scores
from cairn.cli.quality.published import Floats
from cairn.cli.quality.texts import WINDOW, Window
from cairn.codec.base import SINK_TOKENS
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration
from cairn.codec.rotary import Rotary
from cairn.connect.hf_model import geometry_of
from cairn.errors import InputError

#: The step, in deviations of a head, that one plane is given at a time.
_STEP: Final = 0.35
#: Below it KL is not noise of the step any more; a plane that costs less is taken for as insensitive as this.
_LEAST_KL: Final = 1e-7


def calibrate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    name: str,
    windows: int = 3,
    tick: Callable[[int, int], None] | None = None,
) -> Calibration:
    """A forward pass a plane and window. Raises InputError for a text that is too short, GeometryError for a model that
    Cairn does not serve."""
    ids = tokenizer(text[: 1 << 20])["input_ids"]
    if len(ids) < windows * WINDOW:
        raise InputError(f"text of {len(ids)} tokens: must have {windows * WINDOW} or more; name a longer one")
    geometry = msgspec.structs.replace(geometry_of(model), dtype="bfloat16")
    rotary = Rotary.from_hf(model.config)
    flat = tuple((1.0,) * geometry.planes for _ in range(geometry.layers))
    codec = CacheGen(geometry, calibration=Calibration(model=name, sensitivity=flat, rotary=rotary))
    steps = np.full((geometry.layers, geometry.planes), _STEP, np.float32)
    whole = codec_subject(lambda rows, first: codec.encode_at(steps, rows, SINK_TOKENS if first else 0), codec)
    found = np.zeros(steps.shape)
    for i in range(windows):
        coarse: dict[int, Floats] = {}
        subjects = {
            f"{layer}.{plane}": _plane_of(whole, coarse, layer, plane)
            for layer in range(geometry.layers)
            for plane in range(geometry.planes)
        }
        for key, score in scores(model, Window(name, ids[i * WINDOW : (i + 1) * WINDOW]), subjects).items():
            layer, plane = map(int, key.split("."))
            found[layer, plane] += max(score.kl, _LEAST_KL) / windows / _STEP**2
        if tick:
            tick(i + 1, windows)
    rounded = tuple(tuple(float(f"{value:.3g}") for value in row) for row in found)
    return Calibration(model=name, sensitivity=rounded, rotary=rotary)


def _plane_of(whole: Subject, coarse: dict[int, Floats], layer: int, plane: int) -> Subject:
    """Only this plane as `whole` leaves it; what `whole` makes of a chunk is kept in `coarse`, by the chunk's id."""

    def run(kv: Floats, first: bool) -> tuple[Floats, int]:
        key = kv.__array_interface__["data"][0]
        if key not in coarse:
            coarse[key] = whole(kv, first)[0]
        changed = kv.copy()
        changed[layer, plane] = coarse[key][layer, plane]
        return changed, CHUNK

    return run
