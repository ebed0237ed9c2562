"""What the doctor deals in: checks, which judge facts that were gathered before, and their findings.

A check is a pure function `judge(config, subject)` over one field of `Facts`; what it looks for is its docstring. It is
registered by `check`, and from there known to the command, to the reference page and to the tests.
"""

import enum
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

from cairn.cli.doctor.facts import Facts
from cairn.config import Config
from cairn.config.sizes import format_size


class Severity(enum.StrEnum):
    """Worst first. error: does not work. warning: works, and costs. note: worth knowing, and nothing is wrong."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"


class Found(NamedTuple):
    """What a check found, with its value, and what its fix is filled in with."""

    text: str
    values: Mapping[str, object]


def found(text: str, **values: object) -> Found:
    return Found(text, values)


Judge = Callable[[Config, Any], Iterable[Found]]


class Check(NamedTuple):
    """about: the field of `Facts` that it judges; without it the check is skipped. fix: a template."""

    name: str
    about: str
    severity: Severity
    why: str
    fix: str
    judge: Judge

    @property
    def looks_for(self) -> str:
        return " ".join((self.judge.__doc__ or "").split())


class Finding(NamedTuple):
    """One thing that is wrong: what was found, why it hurts, and the config line or command that mends it."""

    check: str
    severity: Severity
    found: str
    why: str
    fix: str


class Diagnosis(NamedTuple):
    """findings: worst first. skipped: checks that had nothing to look at, each with what it lacks."""

    findings: tuple[Finding, ...]
    skipped: Mapping[str, str]

    @property
    def sound(self) -> bool:
        return all(one.severity is Severity.NOTE for one in self.findings)


#: Every check by its name, in the order of the modules in `checks`.
CHECKS: Final[dict[str, Check]] = {}

#: How to give a check what it looks at.
_LACKS: Final = {
    "disk": "no storage.disk.path",
    "remote": "no storage.remote.url",
    "model": "no --model",
    "occurrences": "no --sample, or no separator (blending.enabled, or --separator)",
    "boundary": "no separator (blending.enabled, or --separator), or no tokenizer (--model)",
    "sample_tokens": "no --sample, or no tokenizer (--model)",
    "registry": "no cluster.etcd_addr",
    "engines": "no engines: serve.backends, cluster.etcd_addr or --cluster",
    "clocks": "nothing that tells the time over HTTP",
    "publishers": "no publishers: index.instances, serve.backends or cluster.etcd_addr",
}


def check(name: str, about: str, severity: Severity, *, why: str, fix: str) -> Callable[[Judge], Judge]:
    """Registers a judge."""

    def register(judge: Judge) -> Judge:
        CHECKS[name] = Check(name, about, severity, why, fix, judge)
        return judge

    return register


def diagnose(facts: Facts) -> Diagnosis:
    """What all checks say of the facts."""
    findings, skipped = list[Finding](), dict[str, str]()
    for one in CHECKS.values():
        subject = getattr(facts, one.about)
        if subject is None or subject == ():
            skipped[one.name] = _LACKS[one.about]
            continue
        findings += [
            Finding(one.name, one.severity, it.text, one.why, one.fix.format_map(it.values))
            for it in one.judge(facts.config, subject)
        ]
    rank = list(Severity)
    return Diagnosis(tuple(sorted(findings, key=lambda it: rank.index(it.severity))), skipped)


def readable(size: float) -> str:
    """Bytes for people: 23.5 GiB."""
    unit, name = (1 << 30, "GiB") if size >= 1 << 30 else (1 << 20, "MiB")
    return f"{size / unit:.1f} {name}"


def setting(size: float) -> str:
    """Bytes as a configuration has them, rounded down to whole GiB or MiB, at least 1 MiB."""
    unit = 1 << 30 if size >= 1 << 30 else 1 << 20
    return format_size(max(int(size) // unit * unit, 1 << 20))
