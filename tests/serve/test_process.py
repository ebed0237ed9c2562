"""A service's process: how it ends."""

import signal
import subprocess
import sys
import time

import pytest

DEADLINE_S = 30.0

#: Says so when it has begun, and then waits for what hears of no signal.
_STARTS = """
import time
from cairn.serve.indexer.parts import Parts

def start(*_):
    print("starts", flush=True)
    time.sleep(60)

Parts.start = start
from cairn.cli import main
main()
"""


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_a_service_that_still_starts_ends_at_once(by: signal.Signals) -> None:
    """And not only when the time is up that running requests have, as if something had gone wrong."""
    command = [sys.executable, "-c", _STARTS, "index", "--http-port", "0", "--no-rpc", "--set", "index.shutdown_s=25"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "starts\n"
        began = time.monotonic()
        service.send_signal(by)
        _, complaint = service.communicate(timeout=DEADLINE_S)
    assert (service.returncode, complaint) == (130, "")
    assert time.monotonic() - began < 20
