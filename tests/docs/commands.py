"""Command lines as documentation and manifests show them, checked without running them."""

import functools
import importlib.util
import itertools
import json
import re
import shlex
import tomllib
from collections.abc import Iterator, Sequence
from typing import Any

import typer.main
from starlette.testclient import TestClient

from cairn.cli import app
from cairn.config import Config, load_config
from cairn.serve.gateway import app as gateway_app
from cairn.serve.indexer.app import make_app
from cairn.serve.indexer.parts import Parts
from tests.docs.pages import ROOT

#: Programs of others, whose options are theirs; files of this repository that they name must exist.
OTHERS = {"docker", "echo", "kubectl", "mkdir", "openssl", "sed", "systemctl"}
_WORDS = {"until", "while", "do", "done", "if", "then", "fi", "!", "("}
#: What commands of the documentation make themselves.
_MADE = "deploy/secrets"
_OURS = re.compile(r"^(deploy|docs|examples|benchmarks|tests)/[\w./-]+$")


def check(script: str) -> int:
    """Checks every command of a shell script; returns how many there are. Raises AssertionError for a wrong one."""
    found = list(_commands(script))
    for words in found:
        try:
            _check_one(words)
        except Exception as error:
            raise AssertionError(f"{shlex.join(words)}: {error}") from error
    return len(found)


def check_cairn(arguments: Sequence[str]) -> None:
    """Raises for unknown commands and options, missing and surplus arguments, and settings that break a rule."""
    command, context, rest = _command_of(arguments)
    given, surplus, _ = command.make_parser(context).parse_args(list(rest))
    assert not surplus, f"surplus arguments {surplus}"
    for parameter in command.params:
        value = given.get(parameter.name)
        assert not parameter.required or value, f"{parameter.name} is missing"
    settings = [part.partition("=")[::2] for part in given.get("settings") or ()]
    load_config(environ={}, overrides=dict(settings))


def _command_of(arguments: Sequence[str]) -> tuple[Any, Any, Sequence[str]]:
    """The command that is meant, its context, and what comes after its name."""
    command: Any = typer.main.get_command(app)
    context = command.context_class(command, info_name="cairn")
    rest = list(arguments)
    while getattr(command, "commands", None) and rest and not rest[0].startswith("-"):
        name = rest.pop(0)
        assert name in command.commands, f"no command {name!r}; there are {', '.join(command.commands)}"
        command = command.commands[name]
        context = command.context_class(command, info_name=name, parent=context)
    return command, context, rest


def _commands(script: str) -> Iterator[list[str]]:
    lexer = shlex.shlex(_without_comments(script.replace("\\\n", " ")), posix=True, punctuation_chars="();<>|&\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    skip = False
    for token in [*lexer, "\n"]:
        if skip:
            skip = False
        elif "<" in token or ">" in token:
            skip = True
            if words and words[-1].isdigit():
                words.pop()
        elif set(token) <= set("();|&\n"):
            if words:
                yield words
            words = []
        elif words or token not in _WORDS:
            words.append(token)


def _without_comments(script: str) -> str:
    quote, found, comment = "", [], False
    for before, here in itertools.pairwise(f"\n{script}"):
        comment = here != "\n" and (comment or (here == "#" and not quote and before.isspace()))
        if not comment:
            found.append(here)
            if here in ("'", '"') and quote in ("", here):
                quote = "" if quote else here
    return "".join(found)


def _check_one(words: list[str]) -> None:
    environ = {}
    while words and re.match(r"^\w+=", words[0]):
        name, _, value = words[0].partition("=")
        environ[name] = value
        words = words[1:]
    load_config(environ={key: value for key, value in environ.items() if key != "CAIRN_CONFIG"})
    if not words:
        return
    program, arguments = words[0].rpartition("/")[2], words[1:]
    for word in arguments:
        assert not _OURS.match(word) or word.startswith(_MADE) or (ROOT / word).exists(), f"no {word}"
    if program == "cairn":
        check_cairn(arguments)
    elif program in ("python", "python3"):
        _check_python(arguments)
    elif program == "make":
        targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        unknown = [word for word in arguments if "=" not in word and word not in targets]
        assert not unknown, f"no targets {unknown}"
    elif program == "pip":
        _check_pip(arguments)
    elif program == "vllm":
        _check_vllm(arguments)
    elif program == "curl":
        _check_curl(arguments)
    else:
        assert program in {*OTHERS, ".", ":"}, "a program that this check does not know"


def _check_curl(arguments: Sequence[str]) -> None:
    """That a service's default port has this path."""
    for word in arguments:
        asked = re.match(r"^localhost:(\d+)(/[^?]*)", word)
        if asked:
            routes = {"9888": gateway_routes(), "8600": index_routes()}[asked[1]]
            assert any(re.fullmatch(route, asked[2]) for route in routes), f"no {asked[2]}; there are {sorted(routes)}"


@functools.cache
def index_routes() -> frozenset[str]:
    parts = Parts(Config().index)
    try:
        return frozenset(TestClient(make_app(parts, None)).get("/openapi.json").json()["paths"])
    finally:
        parts.close()


def gateway_routes() -> frozenset[str]:
    return gateway_app._SHOWN | {r"/v1/models/[\w.-]+", "/admin/instances", r"/admin/instances/[\w.-]+/(un)?drain"}


def _check_python(arguments: Sequence[str]) -> None:
    if arguments[0] == "-m":
        assert importlib.util.find_spec(arguments[1]), f"no module {arguments[1]}"
    elif arguments[0] == "-c":
        compile(arguments[1], "-c", "exec")
    else:
        assert (ROOT / arguments[0]).is_file(), f"no file {arguments[0]}"


def _check_pip(arguments: Sequence[str]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for word in arguments:
        if word.startswith("cairn-kv["):
            for extra in word.partition("[")[2].rstrip("]").split(","):
                assert extra in project["optional-dependencies"], f"no extra {extra!r}"


def _check_vllm(arguments: Sequence[str]) -> None:
    """That its options of JSON are JSON, name a module that there is, and settings of ours."""
    for word in arguments:
        if not word.startswith("{"):
            continue
        given = json.loads(word)
        module = given.get("kv_connector_module_path")
        assert module is None or (ROOT / "src" / module.replace(".", "/")).exists(), f"no module {module}"
        extra = given.get("kv_connector_extra_config", {})
        bare = {"enable_cache_upload", "enable_service_routing", "enable_disagg_pd"}
        load_config(environ={}, overrides={f"engine.{key}" if key in bare else key: extra[key] for key in extra})
