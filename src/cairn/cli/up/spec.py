"""What `cairn up` is told: the file's schema."""

from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, model_validator

from cairn.config.types import Port, Section
from cairn.errors import ConfigError


class EngineSpec(Section):
    """One engine, or several that are alike."""

    kind: Literal["vllm", "mock", "command"] = Field(
        default="vllm", description="`vllm serve` with Cairn's connector; a mock; or any OpenAI-compatible server."
    )
    name: str = Field(default="engine", pattern=r"^[\w.-]{1,64}$")
    count: int = Field(default=1, ge=1, le=64)
    port: Port = Field(default=0, description="Of the first one, the next have the next ports; 0: free ones.")
    role: Literal["DEFAULT", "PREFILL", "DECODE", "MIX"] = "DEFAULT"
    model: str = Field(default="", description="Directory or hub name, for vLLM.")
    command: tuple[str, ...] = Field(default=(), description="Of kind `command`; {port} stands for the port.")
    options: tuple[str, ...] = Field(default=(), description="Further options of the engine's command line.")
    environ: dict[str, str] = Field(default={}, description="Beside this process's own.")

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> Self:
        if self.kind == "vllm" and not self.model:
            raise ValueError("model must be named for vllm")
        if (self.kind == "command") != bool(self.command):
            raise ValueError("command must be given for kind command, and for no other")
        return self


class TrafficSpec(Section):
    """Clients that ask, so that there is something to see."""

    model: str = Field(default="mock", description="What they ask for.")
    rate: float = Field(default=2.0, gt=0, le=1000, description="Requests a second, in the mean.")


class ClusterSpec(Section):
    """The cluster."""

    engines: tuple[EngineSpec, ...] = Field(min_length=1)
    etcd: bool = Field(default=False, description="An etcd of its own; else the service is told of the engines.")
    node: bool = Field(default=False, description="A node, which the engines share their KV through.")
    traffic: TrafficSpec | None = Field(default=None, description="Clients that ask; null: none.")
    config: dict[str, Any] = Field(default={}, description="Cairn's settings, as in a configuration file.")

    @model_validator(mode="after")
    def _names_are_unique(self) -> Self:
        names = [name for one in self.engines for name in names_of(one)]
        if len({*names}) < len(names):
            raise ValueError("engines must have different names")
        return self


def names_of(engine: EngineSpec) -> list[str]:
    """The names of those that are alike: with a number behind, if there are several."""
    return [engine.name] if engine.count == 1 else [f"{engine.name}-{i}" for i in range(engine.count)]


def load_spec(path: Path) -> ClusterSpec:
    """Raises ConfigError, in one line, for what is none."""
    try:
        return ClusterSpec.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{path}: {place}: {first['msg'].removeprefix('Value error, ')}") from None
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
