"""Measures what `cairn.codec.calibration` holds: how much KL a model pays for noise in each plane of its KV."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import msgspec
import numpy as np
import torch

from cairn.cli.quality.measure import codec_subject, coded, context_kv, divergence, log_probabilities
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


@torch.inference_mode()  # type: ignore[untyped-decorator]
def calibrate(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    name: str,
    windows: int = 3,
    tick: Callable[[int, int], None] = lambda done, of: None,  # noqa: ARG005
) -> Calibration:
    """A forward pass a plane and window. tick: told how many are done, of how many.

    Raises InputError for a text that is too short, GeometryError for a model that Cairn does not serve.
    """
    ids = tokenizer(text[: 1 << 20])["input_ids"]
    if len(ids) < windows * WINDOW:
        raise InputError(f"text of {len(ids)} tokens: must have {windows * WINDOW} or more; name a longer one")
    geometry = msgspec.structs.replace(geometry_of(model), dtype="bfloat16")
    rotary = Rotary.from_hf(model.config)
    flat = tuple((1.0,) * geometry.planes for _ in range(geometry.layers))
    codec = CacheGen(geometry, calibration=Calibration(model=name, sensitivity=flat, rotary=rotary))
    steps = np.full((geometry.layers, geometry.planes), _STEP, np.float32)
    coarse = codec_subject(lambda rows, first: codec.encode_at(steps, rows, SINK_TOKENS if first else 0), codec)
    costs = np.zeros(steps.shape)
    for i in range(windows):
        window = Window(name, ids[i * WINDOW : (i + 1) * WINDOW])
        kv = context_kv(model, window)
        noisy, _ = coded(kv, coarse)
        for place, kl in _planes(model, window, kv, noisy):
            costs[place] += max(kl, _LEAST_KL) / windows / _STEP**2
            tick(i * steps.size + place[0] * geometry.planes + place[1] + 1, windows * steps.size)
    rounded = tuple(tuple(float(f"{value:.3g}") for value in row) for row in costs)
    return Calibration(model=name, sensitivity=rounded, rotary=rotary)


def _planes(model: Any, window: Window, kv: Floats, noisy: Floats) -> Iterator[tuple[tuple[int, int], float]]:
    """((layer, plane), KL) of every plane alone as it is in `noisy`."""
    layers = list(model.base_model.layers)
    outputs: list[Any] = []
    hooks = [layer.register_forward_hook(lambda _module, _given, output: outputs.append(output)) for layer in layers]
    plain = log_probabilities(model, window, kv)
    for hook in hooks:
        hook.remove()
    for i in range(len(layers)):
        for plane in range(kv.shape[1]):
            changed = kv[i].copy()
            changed[plane] = noisy[i, plane]
            with _recalled(layers[:i], outputs):
                found = log_probabilities(model, window, [*kv[:i], changed, *kv[i + 1 :]])
            yield (i, plane), divergence(plain, found)


@contextmanager
def _recalled(layers: list[Any], outputs: list[Any]) -> Iterator[None]:
    """Within it these layers give what they gave before, at no cost: what is changed above them does not reach them."""
    for layer, output in zip(layers, outputs, strict=False):
        layer.forward = lambda *_given, output=output, **_named: output
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward
