"""Runs a command and kills its group when our stdin ends: the test that started us is over, however it ended.

Stands between a test and a server, because a server whose test was killed would stay. Frozen with its group it goes all
the same, since the kernel kills an orphaned stopped group (SIGHUP, then SIGCONT).
"""

import os
import signal
import subprocess
import sys
import threading

if __name__ == "__main__":
    child = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)

    def watch() -> None:
        sys.stdin.buffer.read()
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()
    sys.exit(child.wait())
