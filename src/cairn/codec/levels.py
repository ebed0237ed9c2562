"""Levels of quality, named by what they promise."""

from collections.abc import Mapping
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from cairn.codec.calibration import Calibration
from cairn.kv import KVGeometry

#: Which part of what a level may cost is spent. Noise in all planes at once costs 1.15 times the sum of what each costs
#: alone, and texts differ.
_SPENT: Final = 0.65
#: Beyond it a plane is mostly zeros, and noise no longer grows with the square of the step.
_WIDEST: Final = 1.5


class Level(NamedTuple):
    """How coarse `cachegen` quantizes.

    kl: what it may cost in nats a token on average, context and scored tokens as in `cairn bench quality`; with a
    calibration the steps follow from it. key_step, value_step: steps without one, relative to a head's deviation, for K
    and for V (or an MLA latent).
    """

    name: str
    kl: float
    key_step: float
    value_step: float

    def relative_steps(self, geometry: KVGeometry, calibration: Calibration | None) -> npt.NDArray[np.float32]:
        """float32 [layers, planes].

        With a calibration every plane is given the same share of the KL: where KL grows with the square of the step and
        bits fall with its logarithm, no other split costs fewer bits (reverse water-filling over layers).
        """
        if calibration is None:
            steps = [self.key_step, self.value_step] if geometry.planes == 2 else [self.value_step]
            return np.tile(np.array(steps, np.float32), (geometry.layers, 1))
        share = _SPENT * self.kl / (geometry.layers * geometry.planes)
        return np.minimum(np.sqrt(share / np.array(calibration.sensitivity)), _WIDEST).astype(np.float32)


LEVELS: Final[Mapping[str, Level]] = {
    level.name: level
    for level in (
        Level("near-lossless", 0.0002, 0.06, 0.045),
        Level("high", 0.001, 0.15, 0.117),
        Level("balanced", 0.003, 0.256, 0.192),
        Level("small", 0.01, 0.45, 0.34),
    )
}
