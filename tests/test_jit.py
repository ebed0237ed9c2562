"""Kernels wherever Cairn is installed."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import cairn
from cairn.jit import kernel


def test_a_kernel_needs_no_place_to_keep_its_machine_code() -> None:
    # Code without a file is to numba what a read-only installation without a home is: there is nowhere to cache it.
    scope: dict[str, Any] = {}
    exec(compile("def double(x):\n    return 2 * x", "<nowhere>", "exec"), scope)
    assert kernel(scope["double"])(21) == 42


def test_machine_code_goes_with_all_sources_not_only_with_its_own_file(tmp_path: Path) -> None:
    """A kernel inlines what other files define; numba by itself would keep the old machine code when those change."""
    package = tmp_path / "cairn"
    package.mkdir()
    jit = Path(cairn.__file__).parent / "jit.py"
    (package / "jit.py").write_bytes(jit.read_bytes())
    (package / "__init__.py").write_text("")
    (package / "b.py").write_text(
        "from cairn.a import WIDTH\nfrom cairn.jit import kernel\n\n\n@kernel\ndef width() -> int:\n    return WIDTH\n"
    )

    def width(value: int) -> int:
        (package / "a.py").write_text(f"WIDTH = {value}\n")
        code = "from cairn.b import width; print(width())"
        command = [sys.executable, "-c", code]
        return int(subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout)

    assert width(7) == 7
    assert width(1234) == 1234
