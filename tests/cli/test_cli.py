"""The command line as its user meets it: what it prints, on which stream, and how it ends."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml

import cairn
from cairn.cli import app
from cairn.config import Config
from cairn.errors import ClosedError, ConfigError, GeometryError, InputError, LockedError, StorageError

CAIRN = [sys.executable, "-c", "from cairn.cli import main; main()"]


Run = Callable[..., subprocess.CompletedProcess[str]]


def assert_one_line(ended: subprocess.CompletedProcess[str], code: int, message: str) -> None:
    assert (ended.returncode, ended.stdout, ended.stderr) == (code, "", f"cairn: {message}\n")


def every_command(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    subcommands = getattr(command, "commands", {})
    if not subcommands:
        yield path, command
    for name, subcommand in subcommands.items():
        yield from every_command(subcommand, (*path, name))


COMMANDS = [path for path, _ in every_command(typer.main.get_command(app))]


def test_the_commands_are_there() -> None:
    benches = {
        ("bench", name)
        for name in (
            "engine",
            "disk",
            "index",
            "fleet",
            "node",
            "remote",
            "policy",
            "autopilot",
            "fleet-sim",
            "machine",
            "quality",
            "serve",
            "blend",
            "observe",
        )
    }
    events = {("events", name) for name in ("record", "replay", "show")}
    clusters = {("register",)} | {("cluster", name) for name in ("list", "watch", "drain", "slo")}
    configs = {("config", name) for name in ("show", "check", "schema", "docs", "import-lmcache")}
    figures = {("metrics", name) for name in ("docs", "dashboard")}
    alone = {
        ("demo",),
        ("doctor",),
        ("index",),
        ("inspect",),
        ("plan",),
        ("node",),
        ("serve",),
        ("status",),
        ("up",),
        ("version",),
        ("codec", "calibrate"),
        ("blend", "check"),
    }
    assert {*COMMANDS} == {*alone, *benches, *clusters, *configs, *events, *figures}


@pytest.mark.parametrize("path", COMMANDS, ids=" ".join)
def test_every_command_explains_itself_with_an_example(run: Run, path: tuple[str, ...]) -> None:
    ended = run(*path, "--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert f"Usage: cairn {' '.join(path)}" in ended.stdout
    assert f"Example:\n    cairn {' '.join(path)}" in ended.stdout


@pytest.mark.parametrize("group", [(), ("config",), ("bench",)])
def test_a_group_alone_shows_its_help(run: Run, group: tuple[str, ...]) -> None:
    assert run(*group).stdout.strip() == run(*group, "--help").stdout.strip()


def test_version(run: Run) -> None:
    assert run("--version").stdout == f"cairn {cairn.__version__}\n"
    assert run("version").stdout.startswith(f"cairn        {cairn.__version__}\n")
    versions = json.loads(run("version", "--json").stdout)
    assert versions["cairn"] == cairn.__version__
    assert versions["python"] == ".".join(map(str, sys.version_info[:3]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qqq"], "No such command 'qqq'; see `cairn --help`"),
        (["config", "show", "--what"], "No such option: --what; see `cairn config show --help`"),
        (["inspect"], "Missing argument 'path'; see `cairn inspect --help`"),
        (["bench", "disk", "x"], "Got unexpected extra argument(s) (x); see `cairn bench disk --help`"),
        (["config", "check", "--set", "engine"], "'engine': must be KEY=VALUE, as in storage.cpu.size=8GiB"),
        (["config", "show", "--set", "cpu.size=1"], "cpu.size: unknown key; did you mean storage.cpu.size?"),
        (["config", "check", "/nothing.yaml"], "/nothing.yaml: cannot be read: No such file or directory"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run: Run, arguments: list[str], message: str) -> None:
    assert_one_line(run(*arguments), 2, message)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError, 2),
        (GeometryError, 2),
        (InputError, 2),
        (StorageError, 1),
        (LockedError, 1),
        (ClosedError, 1),
    ],
)
def test_what_cairn_raises_is_one_line(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: type[Exception], code: int
) -> None:
    def fail(**_: object) -> None:
        raise error("/x: is no\n  directory")

    monkeypatch.setattr("cairn.config.load_config", lambda *_, **__: fail())
    assert_one_line(run("config", "check"), code, "/x: is no directory")


def test_a_package_of_an_extra_that_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cairn.config", None)  # any import that fails will do; torch's stands for it
    monkeypatch.setattr("cairn.cli._EXTRA", {"cairn.config": "demo"})
    assert_one_line(run("config", "check"), 1, "cairn.config is not installed; pip install 'cairn-kv[demo]' brings it")


def test_config_show(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "cairn.yaml"
    file.write_text("storage: {cpu: {size: 2GiB}}")
    shown = run("config", "show", file, "--set", "engine.timeout_s=2", "--set", "engine.planner=false")
    assert shown.returncode == 0
    tree = yaml.safe_load(shown.stdout)
    assert (tree["storage"]["cpu"]["size"], tree["engine"]["timeout_s"], tree["engine"]["planner"]) == (
        "2GiB",
        2,
        False,
    )
    assert json.loads(run("config", "show", file, "--json").stdout)["storage"]["cpu"]["size"] == 2 << 30


def test_config_check(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run("config", "check").stdout == "ok\n"
    monkeypatch.setenv("CAIRN_STORAGE__DISK__THREADS", "none")
    assert run("config", "check").returncode == 2


def test_config_schema_is_the_schema(run: Run) -> None:
    assert json.loads(run("config", "schema").stdout) == Config.model_json_schema()


def test_help_is_light() -> None:
    """No command's help may wait for what only a running command needs."""
    heavy = ("numba", "numpy", "torch", "transformers", "pydantic", "yaml", "rich", "prometheus_client", "matplotlib")
    code = f"import sys, cairn.cli; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


def test_help_is_quick() -> None:
    seconds = []
    for _ in range(5):
        with subprocess.Popen([*CAIRN, "--help"], stdout=subprocess.DEVNULL) as process:
            _, status, used = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        assert process.returncode == 0
        seconds.append(used.ru_utime + used.ru_stime)  # other tests have the cores at the same time
    assert min(seconds) < 0.3, "of processor time; 0.12 s on an idle machine"


def test_completion(monkeypatch: pytest.MonkeyPatch) -> None:
    environ = {**os.environ, "_CAIRN_COMPLETE": "complete_bash", "COMP_WORDS": "cairn con", "COMP_CWORD": "1"}
    done = subprocess.run(CAIRN, env=environ, capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.split() == ["config"]


def test_ctrl_c_ends_at_once_with_130(tmp_path: Path) -> None:
    fifo = tmp_path / "cairn.yaml"
    os.mkfifo(fifo)
    with (
        subprocess.Popen(
            # A test run in the background was told to ignore it, and children inherit that.
            ["env", "--default-signal=INT", *CAIRN, "config", "check", str(fifo)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        ) as child,
        fifo.open("w"),
    ):  # opens when the command has come as far as reading it
        child.send_signal(signal.SIGINT)
        out, err = child.communicate(timeout=60)
    assert (child.returncode, out, err) == (130, b"", b"")


def test_a_closed_pipe_is_no_traceback() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*CAIRN, "config", "docs"], stdout=writer, stderr=subprocess.PIPE, check=False, timeout=60)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("command", ["version", "config docs", "--help"])
def test_an_output_that_takes_nothing_is_one_line(command: str, unbuffered: str) -> None:
    """As a full disk behind `> cairn.yaml`: it must not pass for a file that was written."""
    with Path("/dev/full").open("wb") as full:
        ended = subprocess.run(
            [*CAIRN, *command.split()],
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            check=False,
        )
    said = "cairn: the output cannot be written: No space left on device; send it elsewhere\n"
    assert (ended.returncode, ended.stderr) == (1, said)
