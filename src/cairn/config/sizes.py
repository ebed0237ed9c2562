"""Sizes in bytes, as people write them."""

import re

PATTERN = r"\s*(\d+(?:\.\d+)?)\s*([KMGT]iB|[kKMGT]?B|)\s*"
RULE = "must be a number of bytes, or a number with KiB, MiB, GiB or TiB (8GiB)"

_BINARY = {"TiB": 1 << 40, "GiB": 1 << 30, "MiB": 1 << 20, "KiB": 1 << 10}
_UNITS = {"": 1, "B": 1, **_BINARY, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(value: object) -> int:
    """Bytes from an int or from text such as "8GiB", "1.5 TiB" or (decimal) "500MB". Raises ValueError."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(PATTERN, value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(RULE)
    number, unit = match[1], _UNITS[match[2]]
    try:
        return int(float(number) * unit) if "." in number else int(number) * unit
    except OverflowError:  # of more digits than there are bytes
        raise ValueError(RULE) from None


def format_size(size: int) -> str:
    """The shortest exact text that `parse_size` reads back: "8GiB", "1536KiB", "1000"."""
    for name, unit in _BINARY.items():
        if size and size % unit == 0:
            return f"{size // unit}{name}"
    return str(size)
