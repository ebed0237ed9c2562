"""Plain attention for some rows of a prompt over all that stands before them."""

from typing import Any, Final

import torch
from torch.nn.functional import pad, scaled_dot_product_attention

from cairn.blend.base import Planes

#: Rows that share one mask: fewer look at less of what is behind them, more make better use of the machine.
_GROUP: Final = 256


def attend(queries: Any, planes: Planes, positions: Any, scale: float) -> Any:
    """Softmax attention of queries [rows, heads, dim], row i over tokens 0..positions[i] of the planes.

    positions: int64 [rows], ascending. Returns [rows, heads, dim]. Rows that are the whole prompt take the way that
    models take for it, so that they come out the same, bit for bit; so do those behind a short prefix, with rows of
    zeros for it, as that way looks at nothing that is masked. Other rows are one kernel on CUDA, which waits for
    nothing, and groups under a mask elsewhere.
    """
    rows = len(positions)
    if queries.is_cuda and rows < len(planes[0]):
        from cairn.blend.triton_attention import attend as attend_rows

        return attend_rows(queries, *planes, positions, scale)
    stop = int(positions[-1]) + 1
    lead = stop - rows
    keys, values = (plane[:stop].transpose(0, 1)[None] for plane in planes)
    states = queries.transpose(0, 1)[None]
    if int(positions[0]) == lead <= rows:
        out = scaled_dot_product_attention(
            pad(states, (0, 0, lead, 0)), keys, values, is_causal=stop > 1, scale=scale, enable_gqa=True
        )
        return out[0, :, lead:].transpose(0, 1)
    order = torch.arange(stop, device=positions.device)
    parts = []
    for first in range(0, rows, _GROUP):
        some = positions[first : first + _GROUP]
        top = int(some[-1]) + 1
        mask = some[:, None] >= order[:top]
        parts.append(
            scaled_dot_product_attention(
                states[:, :, first : first + _GROUP],
                keys[:, :, :top],
                values[:, :, :top],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
        )
    return torch.cat(parts, dim=2)[0].transpose(0, 1)
