"""The schema's settings by their keys: what file, environment, messages and pages call them."""

from collections.abc import Iterator

import yaml
from pydantic.fields import FieldInfo

from cairn.config.schema import Config
from cairn.config.types import Section

#: A key as its parts: ("storage", "cpu", "size").
KeyPath = tuple[str, ...]


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


def is_secret(key: KeyPath) -> bool:
    """Whether a setting's value must not be shown."""
    return "SecretStr" in str(dict(settings())[key].annotation)


def variable(key: KeyPath) -> str:
    """The environment variable of a key."""
    return "CAIRN_" + "__".join(key).upper()


def default_text(key: KeyPath) -> str:
    """A setting's default as one would write it."""
    tree = Config().model_dump(mode="json", context="text")
    for part in key:
        tree = tree[part]
    return str(yaml.safe_dump(tree)).removesuffix("...\n").strip()
