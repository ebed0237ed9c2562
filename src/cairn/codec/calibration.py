"""What a model's KV bears: measured once a model by `cairn codec calibrate`, used by whoever encodes."""

from pathlib import Path
from typing import Self

import msgspec

from cairn.codec.rotary import Rotary
from cairn.errors import InputError
from cairn.kv import KVGeometry

_SHIPPED = Path(__file__).parent / "calibrations"
#: A file larger than this is not one of ours.
_MOST_BYTES = 1 << 20


class Calibration(msgspec.Struct, frozen=True, kw_only=True):
    """How sensitive a model is to noise in its KV, by layer and plane, and how its keys turn. Immutable.

    sensitivity: [layer][plane], KL in nats a token that quantization of this plane alone costs at a step of one
    deviation of its heads; it grows with the square of the step. rotary: None where keys do not turn, or not plainly.
    """

    model: str
    sensitivity: tuple[tuple[float, ...], ...]
    rotary: Rotary | None = None

    @classmethod
    def load(cls, path: Path) -> Self:
        """Raises InputError for a file that is none."""
        try:
            with path.open("rb") as file:
                found = msgspec.json.decode(file.read(_MOST_BYTES), type=cls)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; name a file of `cairn codec calibrate`") from error
        except msgspec.MsgspecError as error:
            raise InputError(f"{path}: no calibration ({error}); make one with `cairn codec calibrate`") from error
        if not all(value > 0 for row in found.sensitivity for value in row):
            raise InputError(f"{path}: sensitivities must be above 0; make it anew with `cairn codec calibrate`")
        return found

    def save(self, path: Path) -> None:
        """Raises OSError."""
        path.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    def check(self, geometry: KVGeometry) -> None:
        """Raises InputError for the calibration of another geometry."""
        shape = len(self.sensitivity), {len(row) for row in self.sensitivity}
        if shape != (geometry.layers, {geometry.planes}):
            raise InputError(
                f"calibration of {self.model} has {shape[0]} layers: the geometry has {geometry.layers} layers of "
                f"{geometry.planes} planes; use that of the model that is served"
            )
        if self.rotary:
            self.rotary.check(geometry.head_dim)


def shipped(model: str) -> Calibration | None:
    """The calibration that comes with Cairn, if there is one of this name (a file's name without its suffix)."""
    path = _SHIPPED / f"{model}.json"
    return Calibration.load(path) if path.is_file() else None
