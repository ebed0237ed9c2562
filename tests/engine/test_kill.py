"""kill -9 of an inference process: what it had flushed is found, and nothing wrong is."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

from .pages import make_engine, prompt, retrieved, stored

KILLS = 5
PROMPTS = 30


def child(directory: Path) -> None:
    """Stores prompts, flushing every third; tells which are durable."""
    with make_engine(200, directory, 8 << 20) as engine:
        for seed in range(PROMPTS):
            stored(engine, prompt(seed, 100))
            if seed % 3 == 2 and engine.flush(10):
                sys.stdout.write(f"{seed}\n")
                sys.stdout.flush()


def test_what_was_flushed_survives_kill_9(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for kill in range(KILLS):
        directory = tmp_path / str(kill)
        code = f"from pathlib import Path; from tests.engine.test_kill import child; child(Path({str(directory)!r}))"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout
        durable = -1
        for _ in range(int(rng.integers(1, PROMPTS // 3))):
            durable = int(process.stdout.readline())
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(30) == -signal.SIGKILL
        with make_engine(200, directory, 8 << 20) as engine:
            for seed in range(PROMPTS):
                found = retrieved(engine, prompt(seed, 100), timeout=30.0)
                assert found == 100 or seed > durable
            assert engine.get_stats()["miss_tokens"].keys() <= {"absent"}  # type: ignore[union-attr]
