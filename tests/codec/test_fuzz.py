"""A short run of `tests.codec.fuzz` with numba's bounds checks, which need a process of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.mark.slow
def test_hostile_streams_are_refused_or_harmless(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{CHECKOUT / 'src'}:{CHECKOUT}",
        "NUMBA_BOUNDSCHECK": "1",
        # The checks stand in the code before it is optimized, which takes longer than all else here.
        "NUMBA_OPT": "0",
        # Apart from machine code without the checks, and never older than what it calls: see `cairn.jit`.
        "NUMBA_CACHE_DIR": str(tmp_path / "kernels"),
    }
    done = subprocess.run(
        [sys.executable, "-m", "tests.codec.fuzz", "400"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    refused, taken = (int(word) for word in done.stdout.replace(",", "").split() if word.isdigit())
    assert refused > taken > 0
