"""The schema: every setting of Cairn with its default, its rule and what it means.

File, environment, overrides, JSON schema and docs/configuration.md all follow from it: a new setting is one line here.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    SerializationInfo,
    WithJsonSchema,
    model_validator,
)
from pydantic.fields import FieldInfo

from cairn.config.sizes import PATTERN, format_size, parse_size

#: A key as its parts: ("storage", "cpu", "size").
KeyPath = tuple[str, ...]


def _dump_size(size: int, info: SerializationInfo) -> int | str:
    return format_size(size) if info.context == "text" else size


def _directory(value: object) -> Path:
    if not isinstance(value, str | Path) or not str(value):
        raise ValueError("must be the path of a directory, or null")
    return Path(value).expanduser()


Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(_dump_size, return_type=int | str),
    Field(gt=0, le=1 << 60),
    WithJsonSchema(
        {"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, {"type": "string", "pattern": f"^{PATTERN}$"}]}
    ),
]
Directory = Annotated[Path, BeforeValidator(_directory)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Threads = Annotated[int, Field(ge=1, le=64)]
Policy = Literal["lru", "s3fifo", "tenure"]


class Section(BaseModel):
    """A group of settings: immutable, and without room for keys that nobody reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Cpu(Section):
    """DRAM: one arena, taken and pre-faulted when the engine starts."""

    size: Size = Field(default=1 << 30, description="Bytes of the arena.")
    policy: Policy = Field(default="tenure", description="Eviction policy.")


class Disk(Section):
    """SSD: one directory, owned by one process, found warm again after a restart or a crash."""

    path: Directory | None = Field(default=None, description="Cache directory, made if missing; null: no disk tier.")
    size: Size = Field(default=16 << 30, description="Bytes that the directory may take, preallocated.")
    policy: Policy = Field(default="tenure", description="Eviction policy.")
    threads: Threads = Field(default=8, description="Threads that read and write.")
    write_budget_per_day: Size | None = Field(
        default=None, description="Bytes that may be written in a day, to spare the SSD; null: no limit."
    )
    sync_interval_s: Seconds = Field(default=1.0, description="Seconds between syncs: what a power cut may lose.")


class Storage(Section):
    """The tiers, from the fastest to the largest."""

    cpu: Cpu = Cpu()
    disk: Disk = Disk()


class Engine(Section):
    """How a `CacheEngine` works."""

    block_tokens: int = Field(default=16, ge=1, le=4096, description="Tokens of one KV block.")
    timeout_s: Seconds = Field(
        default=5.0, description="Deadline of every operation in seconds; past it the request recomputes."
    )
    lease_s: Seconds = Field(
        default=30.0,
        description="Seconds until what a silent writer or reader holds is taken back; at least timeout_s.",
    )
    planner: bool = Field(default=True, description="Recompute what would take longer to load; false: load every hit.")
    copy_threads: Threads = Field(default=2, description="Threads that copy between the paged KV cache and the arena.")
    write_behind: float = Field(
        default=0.25,
        ge=0,
        le=1,
        description="Largest share of the arena that is pinned at a time while it is written to disk.",
    )
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="WARNING", description="Least severe level that is logged."
    )

    @model_validator(mode="after")
    def _lease_outlives_operation(self) -> Self:
        if self.lease_s < self.timeout_s:
            raise ValueError(f"lease_s={self.lease_s:g} must be at least timeout_s={self.timeout_s:g}; raise lease_s")
        return self


class Config(Section):
    """All of Cairn's settings; every one has a default. Made by `load_config`; immutable."""

    storage: Storage = Storage()
    engine: Engine = Engine()

    def to_yaml(self) -> str:
        """The file that would make this configuration."""
        return str(yaml.safe_dump(self.model_dump(mode="json", context="text"), sort_keys=False))


def sections(section: type[Section] = Config, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, type[Section]]]:
    """Every section with its key, `Config` itself (the empty key) first."""
    yield prefix, section
    for name, field in section.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            yield from sections(field.annotation, (*prefix, name))


def settings() -> Iterator[tuple[KeyPath, FieldInfo]]:
    """Every setting with its key, section by section."""
    every = dict(sections())
    for prefix, section in every.items():
        for name, field in section.model_fields.items():
            if (*prefix, name) not in every:
                yield (*prefix, name), field


def variable(key: KeyPath) -> str:
    """The environment variable of a key."""
    return "CAIRN_" + "__".join(key).upper()


def default_text(key: KeyPath) -> str:
    """A setting's default as one would write it."""
    tree = Config().model_dump(mode="json", context="text")
    for part in key:
        tree = tree[part]
    return str(yaml.safe_dump(tree)).removesuffix("...\n").strip()
