"""Kernels wherever Cairn is installed."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numba
import pytest

import cairn
from cairn.jit import cache as jit_cache
from cairn.jit import kernel

_TWICE = "from cairn.jit import kernel\n\n\n@kernel\ndef twice(x):\n    return 2 * x\n"
#: Prints a kernel's result for each word of standard input, and how often it was compiled here.
_ASK = """
import sys
from cairn.b import twice
print("ready", flush=True)
for word in sys.stdin.readline().split():
    print(twice(float(word) if "." in word else int(word)))
print(sum(twice.stats.cache_misses.values()))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Cairn with kernels of a test's own: beside them their machine code is kept."""
    made = tmp_path / "cairn"
    shutil.copytree(Path(cairn.__file__).parent / "jit", made / "jit", ignore=shutil.ignore_patterns("__pycache__"))
    (made / "__init__.py").write_text("")
    return made


def _start(package: Path) -> "subprocess.Popen[str]":
    """A process that has imported the kernel `twice`."""
    pipe = subprocess.PIPE
    made = subprocess.Popen([sys.executable, "-c", _ASK], cwd=package.parent, stdin=pipe, stdout=pipe, text=True)
    assert made.stdout
    assert made.stdout.readline() == "ready\n"
    return made


def _answer(process: "subprocess.Popen[str]", words: str) -> tuple[list[str], int]:
    """The results, and how often the process compiled."""
    out, _ = process.communicate(f"{words}\n", timeout=60)
    assert process.returncode == 0
    *results, compiled = out.split()
    return results, int(compiled)


def test_a_kernel_needs_no_place_to_keep_its_machine_code() -> None:
    # Code without a file is to numba what a read-only installation without a home is: there is nowhere to cache it.
    scope: dict[str, Any] = {}
    exec(compile("def double(x):\n    return 2 * x", "<nowhere>", "exec"), scope)
    assert kernel(scope["double"])(21) == 42


def test_machine_code_goes_with_all_sources_not_only_with_its_own_file(package: Path) -> None:
    """A kernel inlines what other files define; numba by itself would keep the old machine code when those change."""
    (package / "b.py").write_text(
        "from cairn.a import WIDTH\nfrom cairn.jit import kernel\n\n\n@kernel\ndef width() -> int:\n    return WIDTH\n"
    )

    def width(value: int) -> int:
        (package / "a.py").write_text(f"WIDTH = {value}\n")
        code = "from cairn.b import width; print(width())"
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, cwd=package.parent, capture_output=True, text=True, check=True).stdout)

    assert width(7) == 7
    assert width(1234) == 1234


def test_of_processes_that_need_a_kernel_at_once_one_compiles_it(package: Path) -> None:
    (package / "b.py").write_text(_TWICE)
    processes = [_start(package) for _ in range(3)]
    for process in processes:
        assert process.stdin
        process.stdin.write("21\n")
        process.stdin.flush()
    answers = [_answer(process, "") for process in processes]
    assert [results for results, _ in answers] == [["42"]] * 3
    assert sum(compiled for _, compiled in answers) == 1


def test_what_processes_compile_at_once_for_different_arguments_is_all_kept(package: Path) -> None:
    (package / "b.py").write_text(_TWICE)
    words = ("21", "2.5")
    processes = [_start(package) for _ in words]
    for process, word in zip(processes, words, strict=True):
        assert process.stdin
        process.stdin.write(f"{word}\n")
        process.stdin.flush()
    assert [_answer(process, "") for process in processes] == [(["42"], 1), (["5.0"], 1)]
    assert _answer(_start(package), "21 2.5") == (["42", "5.0"], 0)


def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The cache of a kernel of a test's own in this process, and that kernel."""
    source = tmp_path / "kernels_of_a_test.py"
    source.write_text("def twice(x):\n    return 2 * x\n")
    scope: dict[str, Any] = {"__name__": "kernels_of_a_test"}
    exec(compile(source.read_text(), str(source), "exec"), scope)
    monkeypatch.setattr(jit_cache, "_DIRECTORY", str(tmp_path / "kernels"))
    return kernel(scope["twice"])


def _files(tmp_path: Path, suffix: str) -> list[Path]:
    return list((tmp_path / "kernels").rglob(f"*{suffix}"))


def test_who_compiles_too_long_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = _cache(tmp_path, monkeypatch)
    place = Path(twice._cache.cache_path)
    path = place / f"{twice._cache._impl.filename_base}.lock"
    monkeypatch.setattr(jit_cache, "_PATIENCE_S", 0.05)
    monkeypatch.setattr(jit_cache.KernelCache, "_impatient", False)
    other = os.open(path, os.O_RDONLY | os.O_CREAT)
    try:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert twice(21) == 42
        assert not _files(tmp_path, ".nbi"), "only who holds the lock saves"
        monkeypatch.setattr(jit_cache, "_PATIENCE_S", 600.0)
        assert twice(2.5) == 5.0, "one wait is enough"
    finally:
        os.close(other)
    assert twice(2j) == 4j
    assert len(_files(tmp_path, ".nbc")) == 1, "the next one takes the lock as ever"


def test_machine_code_that_a_crash_cut_off_is_compiled_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert _cache(tmp_path, monkeypatch)(21) == 42
    for suffix in (".nbc", ".nbi"):
        for path in _files(tmp_path, suffix):
            path.write_bytes(path.read_bytes()[:10])
        again = _cache(tmp_path, monkeypatch)
        assert again(21) == 42
        assert sum(again.stats.cache_misses.values()) == 1
        healed = _cache(tmp_path, monkeypatch)
        assert healed(21) == 42
        assert sum(healed.stats.cache_misses.values()) == 0


def test_a_full_disk_costs_the_machine_code_not_the_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = _cache(tmp_path, monkeypatch)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(twice._cache._cache_file, "save", full)
    assert twice(21) == 42
    monkeypatch.undo()
    assert twice(2.5) == 5.0, "and the lock was let go of"


def test_nobody_waits_for_a_kernel_that_cannot_be_compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    twice = _cache(tmp_path, monkeypatch)
    with pytest.raises(numba.TypingError):
        twice(None)
    (path,) = _files(tmp_path, ".lock")
    other = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        os.close(other)
