"""What a process may store by: its codec and those more exact, with what each has been measured to cost."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from cairn.codec.base import Codec, Octets
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration
from cairn.codec.choice import cachegen_on, codec_for, reader_for, refuse_opaque
from cairn.codec.levels import LEVELS
from cairn.codec.lossless import Lossless
from cairn.codec.raw import Raw
from cairn.config.autopilot import Pin
from cairn.config.schema import Compression
from cairn.errors import ConfigError
from cairn.kv import KVGeometry
from cairn.plan import Coded, Why, choose_codec

#: How much a measurement counts against all those before it.
_NEWS: Final = 0.1
#: Decodes that a rehearsal times, the fastest of which counts: a lost time slice is longer than one of them.
_TIMES: Final = 3


class Rung:
    """A codec, and what it makes of bytes: of late, since the values of a cache and the load of a machine change.

    Thread-safe.
    """

    def __init__(self, codec: Codec) -> None:
        self.codec = codec
        self.cost = Coded(1.0, 0.0)
        self._lock = threading.Lock()

    def encoded(self, size: int, stored: int) -> None:
        """Counts `size` bytes of blocks that became `stored`."""
        with self._lock:
            self.cost = self.cost._replace(share=_mix(self.cost.share, stored / size))

    def decoded(self, size: int, seconds: float) -> None:
        """Counts `size` bytes of blocks that took so long to decode."""
        with self._lock:
            self.cost = self.cost._replace(decode_s=_mix(self.cost.decode_s, seconds / size))

    def rehearse(self, blocks: Octets) -> None:
        """Compiles the codec, and measures it on `blocks`, uint8 [n, block_bytes]."""
        out = np.empty_like(blocks)
        stored = self.codec.encode(blocks)
        self.codec.decode(stored, out)
        took = []
        for _ in range(_TIMES):
            begun = time.perf_counter()
            self.codec.decode(stored, out)
            took.append(time.perf_counter() - begun)
        self.cost = Coded(len(stored) / blocks.size, min(took) / blocks.size)


class Ladder:
    """Rungs, the most exact first; the last one is what the configuration names. Thread-safe.

    lossy: whether what is stored by it may come back changed. within_s: see `choose_codec`. device: see `cachegen_on`.
    """

    def __init__(self, codecs: Sequence[Codec], *, within_s: float = 0.0, device: str = "cpu") -> None:
        self._device = device
        self.rungs = [Rung(codec) for codec in codecs]
        self.geometry = codecs[-1].geometry
        self.lossy = not codecs[-1].lossless
        self._within_s = within_s

    def rehearse(self) -> None:
        """Compiles and measures every rung. Tens of milliseconds once compiled."""
        blocks = _drawn(self.geometry)
        for rung in self.rungs:
            rung.rehearse(blocks)

    def choose(self, size: int, transfer_s: Callable[[int], float] | None) -> tuple[Rung, Why]:
        """By which rung to store `size` bytes of blocks, and why. transfer_s: what moving so many bytes takes; None:
        not known yet, which makes it the last rung."""
        if len(self.rungs) == 1:
            return self.rungs[0], Why.PINNED
        if transfer_s is None:
            return self.rungs[-1], Why.UNMEASURED
        costs = [rung.cost for rung in self.rungs]
        rung = self.rungs[choose_codec(costs, size, transfer_s, within_s=self._within_s)]
        return rung, Why.FASTER if rung is self.rungs[-1] else Why.AS_FAST

    def reader(self, codec_id: str) -> Codec | None:
        """What decodes the objects of a codec, be it a rung or not; None if there is no such codec."""
        rung = next((rung for rung in self.rungs if rung.codec.id == codec_id), None)
        if rung:
            return rung.codec
        try:
            return reader_for(self.geometry, codec_id, self._device)
        except ConfigError:  # no rung needs the device, so nobody has missed it yet
            return reader_for(self.geometry, codec_id)

    def decoded(self, codec_id: str, size: int, seconds: float) -> None:
        """Counts what decoding took: levels of one codec cost the same."""
        for rung in self.rungs:
            if rung.codec.id == codec_id:
                rung.decoded(size, seconds)


def ladder_for(
    geometry: KVGeometry, settings: Compression, pin: Pin = "auto", *, canonical: bool = True
) -> Ladder | None:
    """The ladder that `compression` asks for; None: nothing is compressed.

    pin: `autopilot.codec`. canonical: whether blocks are bytes of the canonical layout. Raises GeometryError for blocks
    that no codec can make sense of, ConfigError or InputError for settings that do not fit.
    """
    refuse_opaque(settings, canonical)
    if settings.algorithm == "none" or pin == "never":
        return None
    calibration = Calibration.load(settings.calibration) if settings.calibration else None
    wanted = codec_for(
        geometry,
        settings.algorithm,
        quantization_bits=settings.quantization_bits,
        quality=settings.quality,
        calibration=calibration,
        device=settings.device,
    )
    if pin == "always":
        return Ladder([wanted], device=settings.device)
    finer: list[Codec] = [Raw(geometry)]
    if isinstance(wanted, CacheGen):
        levels = list(LEVELS)
        finer += [Lossless(geometry)]
        coarser = levels.index(settings.quality)
        finer += [cachegen_on(settings.device, geometry, LEVELS[name], calibration) for name in levels[:coarser]]
    return Ladder([*finer, wanted], within_s=settings.deadline_s or 0.0, device=settings.device)


def _drawn(geometry: KVGeometry) -> Octets:
    """A block of drawn values of the geometry's dtype, channels of different widths, uint8 [1, block_bytes]."""
    rng = np.random.default_rng(0)
    width = np.exp(rng.normal(-1, 0.6, geometry.block_shape[3:]))
    values: npt.NDArray[Any] = (rng.normal(0, 1, geometry.block_shape) * width).astype(np.float32)
    if geometry.dtype == "bfloat16":
        values = (values.view(np.uint32) >> 16).astype(np.uint16)
    elif geometry.dtype == "float16":
        values = values.astype(np.float16)
    return values.reshape(1, -1).view(np.uint8)


def _mix(before: float, now: float) -> float:
    return (1 - _NEWS) * before + _NEWS * now
