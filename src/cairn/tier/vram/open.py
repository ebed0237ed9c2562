"""Which device a setting means."""

from cairn.errors import ConfigError
from cairn.tier.vram.base import Device

STAND_IN = "stand-in"


def open_device(name: str) -> Device:
    """The device of `storage.vram.device`: "cuda" (the current one), "cuda:N", or "stand-in".

    Raises ConfigError for what is none of these, or for a GPU that is not there.
    """
    if name == STAND_IN:
        from cairn.tier.vram.stand_in import StandIn

        return StandIn()
    kind, _, number = name.partition(":")
    if kind != "cuda" or (number and not number.isdecimal()) or name.endswith(":"):
        raise ConfigError(f"storage.vram.device={name!r}: must be cuda, cuda:N, or {STAND_IN}")
    try:
        from cairn.tier.vram.cuda import Cuda
    except ImportError as error:
        raise ConfigError(f"storage.vram.device={name!r}: needs torch and triton ({error}); install both") from None
    return Cuda(int(number) if number else None)
