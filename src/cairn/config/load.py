"""Fills the schema from a YAML file, `CAIRN_*` variables and overrides, the later one winning.

    storage.cpu.size                the key, as overrides and messages write it
    storage: {cpu: {size: 8GiB}}    in the file
    CAIRN_STORAGE__CPU__SIZE=8GiB   in the environment; values are YAML there too (`null`, `true`, `[1, 2]`)

Nothing is read at import: `load_config` reads the file and the environment it is handed, once.
"""

import difflib
import os
import re
from collections.abc import Hashable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from cairn.config.keys import KeyPath, default_text, is_secret, sections, settings, variable
from cairn.config.schema import Config
from cairn.errors import ConfigError

_OVERRIDE = ""
#: What the parser raises: of its own, and of what looks like, or is tagged as, a date or a number and is none
#: (2026-02-30, 0x_, !!int "", !!timestamp x).
UNREADABLE = (yaml.YAMLError, ValueError, RecursionError, IndexError, AttributeError)
#: Variables that may be written shorter; the long form wins.
_SHORT: dict[str, KeyPath] = {"CAIRN_LOG_LEVEL": ("engine", "log_level")}
#: Keys that have another name now.
_RENAMED: dict[KeyPath, KeyPath] = {
    (section, f"{word}_{what}"): ("observe", f"http_{what}")
    for section, word in (("node", "http"), ("observe", "metrics"))
    for what in ("host", "port", "token")
}
#: How Kubernetes tells of a service. A port without a URL is meant for us: CAIRN_INDEX_HTTP_PORT=8600 is a mistake.
_OF_A_SERVICE = re.compile(
    r"_SERVICE_(HOST|PORT(_\w+)?)=|_PORT(_\d+_[A-Z]+)?=[a-z]+://|_PORT_\d+_[A-Z]+_(PROTO|PORT|ADDR)="
)


class _Value(NamedTuple):
    value: Any
    origin: str  # a file's path, a variable's name, or _OVERRIDE

    def __str__(self) -> str:
        return f"{self.value!r} (in {self.origin})" if self.origin else repr(self.value)


_Values = dict[KeyPath, _Value]


def load_config(
    path: str | Path | None = None,
    environ: Mapping[str, str] = os.environ,
    overrides: Mapping[str, Any] = {},
) -> Config:
    """The configuration from the defaults, then the file `path` (else the one that CAIRN_CONFIG names), then `environ`,
    then `overrides` (`{"storage.cpu.size": "8GiB"}`, or nested mappings).

    Raises ConfigError, in one line, for a file that cannot be read, an unknown key, or a value that breaks its rule.
    """
    path = path or environ.get("CAIRN_CONFIG")
    values: _Values = dict(_leaves(_read(Path(path)), str(path))) if path else {}
    values |= _from_environ(environ)
    values |= _leaves(overrides, _OVERRIDE)
    tree: dict[str, Any] = {}
    known = dict(settings())
    for key, value in values.items():
        if key not in known:
            raise ConfigError(_misplaced(key, value))
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value.value
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_broken(error, values)) from None


def parse_assignment(text: str) -> tuple[str, Any]:
    """An override as a command line gives it: KEY=VALUE, the value in YAML. Raises ConfigError."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise ConfigError(f"{text!r}: must be KEY=VALUE, as in storage.cpu.size=8GiB")
    return key, _parse_value(key, value)


class _Loader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error: the first would be lost without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands twice", problem_mark=key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def _read(path: Path) -> Mapping[Any, Any]:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: must be UTF-8 text in YAML") from None
    except UNREADABLE as error:
        raise ConfigError(f"{path}: must be YAML: {yaml_problem(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, Mapping):
        raise ConfigError(f"{path}: must hold sections (storage:, engine:), not a {type(tree).__name__}")
    return tree


def _from_environ(environ: Mapping[str, str]) -> Iterator[tuple[KeyPath, _Value]]:
    """Ours is what has a `__` or begins with a section's name. Other CAIRN_* variables are not meant for us, nor is
    what Kubernetes makes of services' names: CAIRN_SERVICE_HOST for cairn, CAIRN_SERVE_PORT for cairn-serve."""
    for name, key in _SHORT.items():
        if name in environ:
            yield key, _Value(_parse_value(name, environ[name]), name)
    for name, text in environ.items():
        if not name.startswith("CAIRN_"):
            continue
        key = tuple(name.removeprefix("CAIRN_").lower().split("__"))
        begins_alike = key[0].split("_")[0] in Config.model_fields
        if len(key) > 1 or (begins_alike and not _OF_A_SERVICE.search(f"{name}={text}")):
            yield key, _Value(_parse_value(name, text), name)


def _parse_value(name: str, text: str) -> Any:
    try:
        return yaml.load(text, _Loader)
    except UNREADABLE as error:
        raise ConfigError(
            f"{name}={text!r}: must be a value in YAML, quoted if need be: {yaml_problem(error)}"
        ) from None


def yaml_problem(error: Exception) -> str:
    """What is wrong, in one line; error: one of UNREADABLE."""
    if isinstance(error, (IndexError, AttributeError)):
        return "what is tagged as a number or a date is none"
    if not isinstance(error, yaml.YAMLError):
        return str(error)
    mark = getattr(error, "problem_mark", None)
    place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return f"{getattr(error, 'problem', None) or 'unreadable characters'}{place}"


def _leaves(tree: Mapping[Any, Any], origin: str, prefix: KeyPath = ()) -> Iterator[tuple[KeyPath, _Value]]:
    """Values by key. A section left empty (every line commented out) has none."""
    known = dict(sections())
    for name, value in tree.items():
        key = (*prefix, *str(name).split("."))
        if key in known and (value is None or isinstance(value, Mapping)):
            yield from _leaves(value or {}, origin, key)
        else:
            yield key, _Value(value, origin)


def _misplaced(key: KeyPath, value: _Value) -> str:
    """What is wrong with a value whose key is no setting's."""
    name = ".".join(key)
    groups = dict(sections())
    if key in groups:
        return f"{name}={value}: must be a section with the keys {', '.join(groups[key].model_fields)}"
    found = f"{name} (in {value.origin})" if value.origin else name

    def written(other: KeyPath) -> str:
        return variable(other) if value.origin.startswith("CAIRN_") else ".".join(other)

    if key in _RENAMED:
        return f"{found}: is called {written(_RENAMED[key])} now"
    # Compared with every separator alike, so that storage_cpu_size finds storage.cpu.size.
    alike = {".".join(other).replace("_", "."): other for other in (*dict(settings()), *groups)}
    near = difflib.get_close_matches(name.replace("_", "."), alike, n=1, cutoff=0.5)
    if not near:
        return f"{found}: unknown key; the sections are {', '.join(Config.model_fields)}"
    return f"{found}: unknown key; did you mean {written(alike[near[0]])}?"


def _broken(error: ValidationError, values: _Values) -> str:
    """What is wrong with the first value that breaks its rule."""
    first, *others = error.errors(include_url=False)
    rule = str(first["ctx"]["error"]) if first["type"] == "value_error" else first["msg"]
    rule = rule.replace("Input should", "must")
    key = tuple(str(part) for part in first["loc"])
    more = f" (and {len(others)} more)" if others else ""
    if key not in values:  # a rule between settings
        return f"{'.'.join(key)}: {rule}{more}"
    shown = values[key]._replace(value="(not shown)") if is_secret(key) else values[key]
    return f"{'.'.join(key)}={shown}: {rule}; the default is {default_text(key)}{more}"
