"""A codec by the names that the configuration has for it."""

from typing import Final, get_args

from cairn.codec.base import Codec
from cairn.codec.cachegen import CacheGen
from cairn.codec.calibration import Calibration
from cairn.codec.fixed import Fp8, Int4, Int8
from cairn.codec.levels import LEVELS, Level
from cairn.codec.lossless import Lossless, Packed
from cairn.codec.raw import Raw
from cairn.config.schema import Compression
from cairn.config.types import Algorithm, Quality
from cairn.errors import ConfigError, GeometryError, InputError
from cairn.kv import KVGeometry

_KINDS: Final[dict[str, type[Codec]]] = {kind.id: kind for kind in (Raw, Lossless, Packed, Int4, Int8, Fp8, CacheGen)}
_BITS: Final[dict[int, type[Int4 | Int8]]] = {4: Int4, 8: Int8}


def refuse_opaque(settings: Compression, canonical: bool) -> None:
    """Raises GeometryError where blocks are to be compressed whose bytes no codec can make sense of."""
    if settings.algorithm != "none" and not canonical:
        raise GeometryError(
            f"compression.algorithm={settings.algorithm}: this engine's blocks are opaque pages, or parts of several "
            "ranks, which no codec can read; set compression.algorithm to none"
        )


def reader_for(geometry: KVGeometry, codec_id: str, device: str = "cpu") -> Codec | None:
    """A codec that decodes what the one of this id has stored, whatever its level was; None if there is no such codec.

    Raises as `cachegen_on` does.
    """
    if codec_id == CacheGen.id:
        return cachegen_on(device, geometry)
    kind = _KINDS.get(codec_id)
    return kind(geometry) if kind else None


def cachegen_on(
    device: str, geometry: KVGeometry, level: Level = LEVELS["high"], calibration: Calibration | None = None
) -> CacheGen:
    """`cachegen`, decoded on a device: cpu, cuda or cuda:N. Raises GeometryError for a geometry that is quantized
    already, ConfigError for a device that is not there.
    """
    if device == "cpu":
        return CacheGen(geometry, level, calibration)
    try:
        from cairn.codec.cachegen_cuda import CudaCacheGen
    except ImportError as error:
        raise ConfigError(f"compression.device={device!r}: needs torch and triton ({error}); install both") from None
    return CudaCacheGen(geometry, level, calibration, device=device)


def codec_for(
    geometry: KVGeometry,
    algorithm: Algorithm = "none",
    *,
    quantization_bits: int = 8,
    quality: Quality = "high",
    calibration: Calibration | None = None,
    device: str = "cpu",
) -> Codec:
    """The codec for a geometry. quantization_bits: of `int`; quality, calibration and device: of `cachegen`.

    Raises InputError for a value that names nothing, and as `cachegen_on` does.
    """
    if algorithm not in get_args(Algorithm):
        raise InputError(f"compression.algorithm={algorithm!r}: must be one of {', '.join(get_args(Algorithm))}")
    if algorithm == "int":
        if quantization_bits not in _BITS:
            raise InputError(f"compression.quantization_bits={quantization_bits}: must be 4 or 8")
        return _BITS[quantization_bits](geometry)
    if algorithm == "cachegen":
        if quality not in LEVELS:
            raise InputError(f"compression.quality={quality!r}: must be one of {', '.join(LEVELS)}")
        return cachegen_on(device, geometry, LEVELS[quality], calibration)
    return _KINDS["raw" if algorithm == "none" else algorithm](geometry)
