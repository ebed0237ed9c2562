"""A segment's life: believed while nobody has ended it and its owner lives, however that ends."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cairn.node.life import Life, process_token

_OWNER = """
import sys
from pathlib import Path
from cairn.node.life import Life
life = Life(Path({path!r}), 5, {token!r}, 1)
life.hold()
print("held", flush=True)
sys.stdin.read()
"""
_BESIDE = """
import sys
from pathlib import Path
from cairn.node.life import Life, process_token
held = [Life(Path({path!r}), 5, process_token(), 1) for _ in range(2)]
held[0].hold()
while held:
    held.pop().close()
    print("closed", flush=True)
    sys.stdin.readline()
"""
TOKEN = b"somebody else's."


@pytest.fixture
def page(tmp_path: Path) -> Life:
    return Life(tmp_path / "life", 5, TOKEN, 1, make=True)


def owner(page: Life) -> "subprocess.Popen[str]":
    code = _OWNER.format(path=str(page.path), token=TOKEN)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    assert process.stdout.readline() == "held\n"
    return process


def test_it_lives_as_long_as_its_owner(page: Life) -> None:
    reader = Life(page.path, 5, TOKEN, 1)
    assert not reader.sound(), "nobody holds it yet"
    process = owner(page)
    assert reader.sound()
    assert page.sound()
    with pytest.raises(OSError):
        reader.hold()
    process.kill()
    process.communicate()
    assert not reader.sound()
    assert not reader.over(), "nobody has said so"


def test_who_ends_it_is_believed(page: Life) -> None:
    process = owner(page)
    reader, other = Life(page.path, 5, TOKEN, 1), Life(page.path, 6, TOKEN, 1)
    assert not other.sound(), "another generation"
    page.remove()
    assert reader.over()
    assert not reader.sound()
    assert not page.path.exists()
    process.communicate()


def test_who_reads_in_the_owners_process_does_not_end_it(page: Life) -> None:
    """Another engine there; the kernel drops a process's record locks with any descriptor of the file."""
    code = _BESIDE.format(path=str(page.path))
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True)
    assert process.stdin
    assert process.stdout
    assert process.stdout.readline() == "closed\n"
    assert page.sound(), "who has closed it does not own it"
    process.stdin.write("\n")
    process.stdin.flush()
    assert process.stdout.readline() == "closed\n"
    assert not page.sound()
    process.communicate()


def test_a_page_that_cannot_be_had_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "no room")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="no room"):
        Life(tmp_path / "life", 1, TOKEN, 1, make=True)
    assert not list(tmp_path.iterdir())


def test_a_page_that_is_closed_is_not_believed(page: Life) -> None:
    """Who asks without using it may come when another thread has just given it back."""
    process = owner(page)
    reader = Life(page.path, 5, TOKEN, 1)
    assert reader.sound()
    reader.close()
    assert not reader.sound()
    process.communicate()


def test_a_process_of_its_own(tmp_path: Path) -> None:
    page = Life(tmp_path / "life", 9, process_token(), 1, make=True)
    assert page.sound(), "this process lives"
    page.end()
    assert not page.sound()
    token = process_token()
    child = os.fork()
    if not child:
        os._exit(process_token() == token)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, "a fork is another process"


def test_no_page(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Life(tmp_path / "none", 1, TOKEN, 1)
    (tmp_path / "other").write_bytes(b"x")
    with pytest.raises(OSError, match="no page"):
        Life(tmp_path / "other", 1, TOKEN, 1)
