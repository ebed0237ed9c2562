"""Runs a command with the URLs of real stores on loopback behind it: for benchmarks and by hand.

python -m tests.tier.remote.serve cairn bench remote --json
"""

import contextlib
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.tier.remote import servers


def main() -> int:
    with contextlib.ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="cairn-serve-")))
        places = {name: home / name for name in ("files", "valkey", "weed", "mooncake")}
        for place in places.values():
            place.mkdir()
        valkey = stack.enter_context(servers.running(servers.valkey(places["valkey"])))
        weed = stack.enter_context(servers.running(servers.weed(places["weed"])))
        urls = [
            f"file://{places['files']}",
            f"valkey://127.0.0.1:{valkey.ports[0]}",
            servers.s3_url(weed.ports[0]),
        ]
        with contextlib.suppress(ImportError):
            import mooncake.store  # noqa: F401 - needs libibverbs

            cluster = servers.mooncake(places["mooncake"], 1 << 30)
            stack.enter_context(servers.running(cluster.group))
            urls.append(cluster.url)
        servers.weed_stores(urls[2])
        return subprocess.run([*sys.argv[1:], *urls], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
