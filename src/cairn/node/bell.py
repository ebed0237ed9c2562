"""The bell: how other threads wake one that waits."""

import os


class Bell:
    """A descriptor that can be read once somebody has rung. Lives as long as somebody can ring it, so it has no end."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def ring(self) -> None:
        """From any thread, and from a signal's handler: what was done before is seen by who has `heard`."""
        os.eventfd_write(self._fd, 1)

    def heard(self) -> None:
        """From now on it is silent. Only where it has been rung."""
        os.eventfd_read(self._fd)

    def __del__(self) -> None:
        os.close(self._fd)
