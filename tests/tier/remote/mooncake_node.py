"""A node of a Mooncake cluster: gives it memory, and nothing else.

Arguments: host:port metadata master bytes port; it listens on the last once it is part of the cluster.
"""

import socket
import sys
import threading

from mooncake.store import MooncakeDistributedStore

if __name__ == "__main__":
    host, metadata, master, size, ready = sys.argv[1:]
    store = MooncakeDistributedStore()
    if store.setup(host, metadata, int(size), 16 << 20, "tcp", "", master) != 0:
        sys.exit("mooncake: setup failed")
    listener = socket.create_server(("127.0.0.1", int(ready)))
    threading.Event().wait()
