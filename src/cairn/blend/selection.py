"""Which tokens of reused chunks are computed anew: those whose KV differs most from what is reused (HKVD)."""

import math
from typing import Any

import torch

from cairn.blend.base import Planes


def deviation(keys: Any, values: Any, planes: Planes, positions: Any) -> Any:
    """How much new K and V [rows, heads, dim] differ from those in the planes at `positions`: float32 [rows].

    Squared distances, each plane's as a share of its mean square, because keys are much longer than values.
    """
    total = torch.zeros(len(positions), device=keys.device)
    for new, plane in zip((keys, values), planes, strict=True):
        found = new.float()
        total += (found - plane[positions].float()).square().sum((1, 2)) / found.square().mean().clamp_min(1e-12)
    return total


def keep(deviations: Any, forced: Any, count: int) -> Any:
    """Row numbers, ascending, of all `forced` rows (bool [rows]) and of the `count` others that deviate most, first of
    all those by what is no number.
    """
    most = torch.finfo(deviations.dtype).max
    wanted = deviations.nan_to_num(nan=most, posinf=most).masked_fill(forced, math.inf)
    count = min(len(wanted), count + int(forced.sum()))
    return wanted.topk(count, sorted=False).indices.sort().values
