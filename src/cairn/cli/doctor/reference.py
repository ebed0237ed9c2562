"""The page of all checks, written from their registry."""

from typing import Final

from cairn.cli.doctor import checks  # noqa: F401 - registers them
from cairn.cli.doctor.base import CHECKS

_HEAD: Final = """\
# The doctor

Made from the checks by `make docs`; do not edit.

```bash
cairn doctor cairn.yaml --model /models/llama --sample prompts.txt   # one host
cairn doctor --set cluster.etcd_addr=10.0.0.9:2379                   # a fleet
cairn doctor --cluster cluster.yaml                                  # what `cairn up` is to start
```

It reads the configuration (file, `CAIRN_*`, `--set`), looks at this machine, tries disk and store, asks etcd and every
engine in it or in `serve.backends`, and listens to their KV events for `--wait` seconds. It changes nothing. Run it as
the engine's user, in the engine's container: limits are theirs.

Each finding says what was found, why it hurts, and the config line or the command that mends it. An *error* does not
work; a *warning* works, and costs; a *note* is worth knowing. The exit code is 1 where there is an error or a warning,
2 where the configuration itself breaks a rule (`cairn config check`). `--json` prints
`{"sound", "findings": [{"check", "severity", "found", "why", "fix"}], "skipped"}`. A check that has nothing to look at
is skipped, and named with what it lacks.

Coming from LMCache: `cairn config import-lmcache lmcache-config.yaml > cairn.yaml` writes the configuration that its
file and `LMCACHE_*` variables amount to, with comments that say what became of every setting.

| check | severity | looks for | why it hurts | fix |
| --- | --- | --- | --- | --- |
"""


class _Names(dict[str, str]):
    """Stands for what a finding fills in: SIZE for {size}."""

    def __missing__(self, name: str) -> str:
        return name.upper()


def render() -> str:
    """The page in Markdown; the same text for the same checks."""
    return _HEAD + "".join(
        f"| `{one.name}` | {one.severity} | {_cell(one.looks_for)} | {_cell(one.why)} "
        f"| {_cell(one.fix.format_map(_Names()))} |\n"
        for one in CHECKS.values()
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*")
