"""Runs `cairn` in the test's process, as `main` does, and sees how it ends."""

import os
import sys
from collections.abc import Callable
from subprocess import CompletedProcess

import pytest

from cairn.cli import main

Run = Callable[..., CompletedProcess[str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("config", "show")`, without the CAIRN_* variables of whoever runs the tests."""
    for name in [name for name in os.environ if name.startswith("CAIRN_")]:
        monkeypatch.delenv(name)

    def run(*arguments: object) -> CompletedProcess[str]:
        monkeypatch.setattr(sys, "argv", ["cairn", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        return CompletedProcess(sys.argv, int(caught.value.code or 0), *capsys.readouterr())

    return run
