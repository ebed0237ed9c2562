"""The kinds of values that settings have: how they are written, checked and told."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SecretStr,
    SerializationInfo,
    WithJsonSchema,
)

from cairn.config.sizes import PATTERN, format_size, parse_size
from cairn.config.urls import mask_url


def _dump_size(size: int, info: SerializationInfo) -> int | str:
    return format_size(size) if info.context == "text" and size else size


def _dump_url(url: str, info: SerializationInfo) -> str:
    return mask_url(url) if info.context in ("text", "masked") else url


def _directory(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be the path of a directory, or null")
    return _expanded(value)


def _file(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be the path of a file, or null")
    return _expanded(value)


def _expanded(value: str | Path) -> Path:
    try:
        return Path(value).expanduser()
    except RuntimeError:
        raise ValueError("begins with ~ and the name of no user: the own home is ~/") from None


def _addresses(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _upper(value: object) -> object:
    return value.upper() if isinstance(value, str) else value


def _secret(value: object) -> object:
    """YAML makes numbers of digits; what was meant cannot be told any more."""
    if value is not None and not isinstance(value, str | SecretStr):
        raise ValueError("must be text; put it in quotes")
    return value


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(_dump_size, return_type=int | str),
    Field(gt=0, le=1 << 60),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": f"^{PATTERN}$"}]}
    ),
]
#: As Size, where none at all has a meaning.
SizeOrNone = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(_dump_size, return_type=int | str),
    Field(ge=0, le=1 << 60),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": f"^{PATTERN}$"}]}),
]
Directory = Annotated[Path, BeforeValidator(_directory)]
#: A URL, whose password is not for people to read.
StoreUrl = Annotated[str, Field(min_length=1), PlainSerializer(_dump_url, return_type=str, when_used="unless-none")]
File = Annotated[Path, BeforeValidator(_file)]
Addresses = Annotated[
    tuple[str, ...],
    BeforeValidator(_addresses),
    WithJsonSchema({"anyOf": [{"type": "array", "items": {"type": "string"}}, {"type": "string"}]}),
]
NodeAddress = Annotated[str, Field(pattern=r"^ipc:///.+", max_length=106)]
#: By which others reach a socket.
TcpAddress = Annotated[str, Field(pattern=r"^tcp://[^/*\s]+:\d{1,5}$", max_length=200)]
#: At most 30 years: locks and futures take no more than 292, and raise in who waits.
Seconds = Annotated[float, Field(gt=0, le=1e9, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1, le=64)]
Port = Annotated[int, Field(ge=0, le=65535)]
Worth = Annotated[float, Field(ge=0, le=1e6, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Secret = Annotated[SecretStr, BeforeValidator(_secret)]
Level = Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], BeforeValidator(_upper)]
Policy = Literal["lru", "s3fifo", "tenure"]
Algorithm = Literal["none", "lossless", "packed", "fp8", "int", "cachegen"]
RowCodec = Literal["none", "int8", "fp8", "int4"]
Quality = Literal["near-lossless", "high", "balanced", "small"]
Scheduling = Literal["round_robin", "least_loaded", "prefix_aware", "slo_aware"]


class Section(BaseModel):
    """A group of settings: immutable, and without room for keys that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)
