"""Every code block of the documentation runs, or is checked: see `pages`."""

import ast
import asyncio
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from itertools import islice
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from cairn.cli.up.spec import ClusterSpec
from cairn.config import Config, load_config
from cairn.sim.logs import open_trace
from tests.docs.commands import check, check_cairn
from tests.docs.given import GIVEN, REPLACED
from tests.docs.pages import BLOCKS, PAGES, ROOT, Block, blocks, of
from tests.ports import free_ports

DEADLINE_S = 120.0
_SECTIONS = {*Config.model_fields}


def test_every_block_has_a_language_that_is_checked() -> None:
    known = {"python", "console", "bash", "yaml", "json", "text"}
    assert [f"{block} {block.language!r}" for block in BLOCKS if block.language not in known] == []


@pytest.mark.parametrize("block", of("bash"), ids=str)
def test_commands_are_as_they_are_shown(block: Block) -> None:
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
    assert check(block.text) > 0


@pytest.mark.parametrize("block", of("yaml"), ids=str)
def test_files_are_what_they_are_taken_for(block: Block, tmp_path: Path) -> None:
    for document in yaml.safe_load_all(block.text):
        if "engines" in document:
            spec = ClusterSpec.model_validate(document)
            load_config(environ={}, overrides=spec.config)
        elif document.get("kind") == "Kustomization":
            assert document["apiVersion"] == "kustomize.config.k8s.io/v1beta1"
        elif "kind" in document:
            kubernetes_validate.validate(document, "1.37", strict=True)
            for container in document["spec"]["containers"]:
                if container["image"].startswith("cairn:"):
                    check_cairn(container["args"])
        elif "scrape_configs" in document:
            assert {*document} == {"rule_files", "scrape_configs"}  # Prometheus's own
        else:
            assert {*document} <= _SECTIONS
            path = tmp_path / "cairn.yaml"
            path.write_text(block.text)
            load_config(path, environ={})


@pytest.mark.parametrize("block", of("json"), ids=str)
def test_logs_are_read_as_they_are_shown(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text(block.text)
    assert len(open_trace(path, block_tokens=1)) == len(block.text.splitlines())


_LARGE = re.compile(r"\b\d+( << 30|GiB\b)")


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(block.language in languages for block in blocks(page))]


@pytest.fixture
def names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path], dict[str, Any]]]:
    """What a page takes for granted, by name."""
    monkeypatch.chdir(tmp_path)
    with ExitStack() as stack:
        yield lambda page: GIVEN[page.name](tmp_path, stack) if page.name in GIVEN else {}


@pytest.mark.parametrize("page", pages_with("python"), ids=lambda page: page.name)
def test_python_runs(page: Path, names: Callable[[Path], dict[str, Any]]) -> None:
    """A page's blocks one after the other, with the same names; tiers that are large in the text are small here."""
    known = names(page)
    replaced = known.pop(REPLACED, {})
    for block in blocks(page):
        if block.language == "python":
            small = _LARGE.sub(lambda found: f"64{' << 20' if '<<' in found[1] else 'MiB'}", block.text)
            for shown, real in replaced.items():
                small = small.replace(shown, real)
            code = compile("\n" * block.line + small, str(page), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            waits = eval(code, known)
            if inspect.iscoroutine(waits):
                asyncio.run(asyncio.wait_for(waits, DEADLINE_S))


@pytest.mark.parametrize("page", pages_with("console"), ids=lambda page: page.name)
def test_sessions_go_as_they_are_shown(page: Path, tmp_path: Path) -> None:
    """All of a page's, in one shell, in a directory with the files that the page shows, and a short trace."""
    ports = dict(zip(("9888", "8600"), map(str, free_ports(2)), strict=True))
    steps: list[tuple[str, str]] = []
    for block in blocks(page):
        if block.title:
            (tmp_path / block.title).write_text(moved(block.text, ports))
        if block.language == "console":
            steps += sessions(block)
    with (ROOT / "tests" / "data" / "conversation_2000.jsonl").open() as trace:
        (tmp_path / "conversation_trace.jsonl").write_text("".join(islice(trace, 50)))
    if page.name == "fleet.md":
        steps.insert(0, (FOLLOWED, ""))
    script = "trap 'kill $(jobs -p) 2>/dev/null; wait' EXIT\nexec 2>&1\n"
    script += "".join(f"{moved(command, ports)}\nprintf '\\n@@@\\n'\n" for command, _ in steps)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("CAIRN_")}
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    printed = shell(script, tmp_path, clean | {"PATH": path})
    said = printed.split("\n@@@\n")
    assert len(said) == len(steps) + 1, printed
    for (command, expected), output in zip(steps, said, strict=False):
        pattern = re.escape(moved(expected, ports).strip()).replace(r"\.\.\.", ".*")
        assert re.fullmatch(re.sub(r"\\? +", r"\\s+", pattern), output.strip(), re.DOTALL), f"$ {command}\n{output}"


def shell(script: str, home: Path, environ: dict[str, str]) -> str:
    """What a script has printed. Nothing that it started is left, also where it takes too long."""
    process = subprocess.Popen(
        ["bash", "-c", script], cwd=home, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        return process.communicate(timeout=DEADLINE_S)[0]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


#: What `fleet.md` has told to start before it asks.
FOLLOWED = """cairn index --http-port 8600 --no-rpc --instance a=tcp://127.0.0.1:5557 > index.log &
until curl -sf localhost:8600/health > health.json; do sleep 0.1; done"""


def moved(text: str, ports: dict[str, str]) -> str:
    """With ports that nobody has."""
    return re.sub(r"\b(9888|8600)\b", lambda found: ports[found[1]], text)


def sessions(block: Block) -> Iterator[tuple[str, str]]:
    """Commands (behind `$ `, going on behind `> `) and what they are shown to say."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        lines = part.splitlines()
        count = 1 + next((i for i, line in enumerate(lines[1:]) if not line.startswith("> ")), len(lines) - 1)
        yield "\n".join(line.removeprefix("> ") for line in lines[:count]), "\n".join(lines[count:])
