"""No request waits for a compiler: what it runs was compiled when its engine was made."""

import subprocess
import sys

import pytest

WORK = """
import sys
import numpy as np
from cairn import CacheEngine, load_config
from cairn.jit import compiled
from cairn import Namespace
from tests.engine.pages import GEOMETRY, prompt, retrieved, stored

policy, path = sys.argv[1:]
config = load_config(overrides={
    "storage.cpu.size": "64KiB", "storage.cpu.policy": policy, "storage.disk.policy": policy,
    "storage.disk.path": path, "storage.disk.size": "1MiB", "storage.disk.write_budget_per_day": "1GiB",
})
for _ in range(2):  # the second finds the disk
    with CacheEngine(Namespace(model="m", geometry=GEOMETRY), config) as engine:
        before = compiled()
        journals = engine.watch().values()
        for seed in range(300):
            tokens = prompt(seed % 40, 50 + seed % 30)
            stored(engine, tokens)
            retrieved(engine, tokens)
            for journal in journals:
                journal.silence(journal.changes().slots)
                journal.mention(engine.chain(tokens).keys)
        late = {name: count - before[name] for name, count in compiled().items() if count > before[name]}
    print(late)
"""


@pytest.mark.parametrize("policy", ["lru", "s3fifo", "tenure"])
def test_nothing_is_compiled_once_the_engine_is_there(policy: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = str(tmp_path_factory.mktemp("disk") / "cache")
    run = subprocess.run([sys.executable, "-c", WORK, policy, path], capture_output=True, text=True, timeout=250)
    assert run.stdout.split("\n")[:2] == ["{}", "{}"], run.stdout + run.stderr
