"""The reference page of the configuration, written from the schema."""

from typing import Any

from cairn.config.keys import default_text, sections, settings, variable
from cairn.config.schema import Config

_HEAD = """\
# Configuration

Made from the schema by `make docs`; do not edit.

Settings come from, the later one winning: the defaults below; a YAML file (handed over, or named by `CAIRN_CONFIG`);
environment variables; overrides (`--set KEY=VALUE` on the command line, `overrides=` in `load_config`). Values are YAML
everywhere. Sizes are bytes, or a number with KiB, MiB, GiB or TiB. An unknown key or a value that breaks its rule ends
in one line that says which, where it came from and what would be right; `cairn config check FILE` tells beforehand.
`cairn config show` prints what is in force. `CAIRN_LOG_LEVEL` is short for `CAIRN_ENGINE__LOG_LEVEL`.

The file with every default:

```yaml
"""


def render() -> str:
    """The page in Markdown; the same text for the same schema."""
    schema = Config.model_json_schema()
    parts = [_HEAD, Config().to_yaml(), "```\n"]
    every = list(settings())
    for prefix, section in sections():
        rows = [(key, field) for key, field in every if key[:-1] == prefix]
        if not rows:
            continue
        parts.append(f"\n## {'.'.join(prefix)}\n\n{section.__doc__}\n\n")
        parts.append("| key | default | rule | meaning | variable |\n| --- | --- | --- | --- | --- |\n")
        for key, field in rows:
            rule = _rule(schema["$defs"][section.__name__]["properties"][key[-1]])
            parts.append(
                f"| `{key[-1]}` | `{default_text(key)}` | {rule} | {field.description} | `{variable(key)}` |\n"
            )
    return "".join(parts)


def _rule(schema: dict[str, Any]) -> str:
    """What a value must be, in words."""
    if "anyOf" in schema:
        return " or ".join(_rule(kind) for kind in schema["anyOf"]).replace("integer > 0 or text", "size > 0")
    if "enum" in schema or "const" in schema:
        return ", ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    kind = {"null": "`null`", "string": "text", "boolean": "`true`, `false`"}.get(schema["type"], schema["type"])
    if schema.get("format") == "path":
        kind = "path"
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<="}
    bounds = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return " ".join([kind, ", ".join(bounds)]).strip()
