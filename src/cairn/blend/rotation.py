"""Turns keys from the positions they were computed at to those where they are used."""

from typing import Any, NamedTuple, Self

import torch

from cairn.blend.base import Rope


class Turn(NamedTuple):
    """The way of some tokens' keys from old to new positions: cosines and sines, float32 [tokens, pairs].

    A model computes its angles in float32, which is 0.004 off at position 100,000. So the angles here are the model's
    own float32 ones, at both positions, and only their difference is taken in float64: what is turned is what the model
    would have computed there, to a few units in the last place, and not what it should have.
    """

    cosines: Any
    sines: Any
    interleaved: bool

    @classmethod
    def between(cls, old: Rope, at: Any, new: Rope, to: Any) -> Self:
        """at, to: int64 [tokens] on the device of the keys. `old` is not `new` where frequencies follow the prompt's
        length (dynamic NTK).
        """
        angles = _angles(new, to) - _angles(old, at)
        scale = new.scaling / old.scaling
        return cls((angles.cos() * scale).float(), (angles.sin() * scale).float(), new.interleaved)

    def apply(self, keys: Any, rows: Any) -> None:
        """Turns keys[rows[i]] in place, by row i. keys: [tokens, heads, dim], any float dtype; rows: int64.

        On CUDA one kernel, on the CPU torch.
        """
        if keys.is_cuda:
            from cairn.blend.triton_kernel import turn

            turn(keys, rows, self.cosines, self.sines, interleaved=self.interleaved)
            return
        pairs = self.cosines.shape[1]
        cosines, sines = self.cosines[:, None], self.sines[:, None]
        old = keys[rows].float()
        turned = old[..., : 2 * pairs]
        first, second = (turned[..., ::2], turned[..., 1::2]) if self.interleaved else turned.split(pairs, dim=-1)
        one, two = first * cosines - second * sines, second * cosines + first * sines
        first.copy_(one)
        second.copy_(two)
        keys[rows] = old.to(keys.dtype)


def _angles(rope: Rope, positions: Any) -> Any:
    """As the model has them: a product in float32."""
    frequencies = torch.as_tensor(rope.frequencies, dtype=torch.float32, device=positions.device)
    return (positions.float()[:, None] * frequencies).double()
