"""What asking others takes of late, and so whether it is worth the time."""

import time
from typing import Final

#: What was too slow for a question is measured again after so many seconds without one.
AGAIN_S: Final = 10.0
#: How much one answer counts against all those before it.
_NEWS: Final = 0.2


class Pace:
    """seconds: what a round trip takes, of late; 0 before the first. Thread-safe; waits for nothing.

    One slow answer must not end all questions, as with them the measurements end that would take it back: once it is
    `overdue` somebody asks though it does not pay, and nobody waits for the answer.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self._due = 0.0

    def pays(self, worth_s: float) -> bool:
        """Whether to ask where knowing could save so many seconds."""
        return self.seconds <= worth_s

    @property
    def overdue(self) -> bool:
        """Whether nobody has been asked for long."""
        return time.monotonic() >= self._due

    def asked(self) -> None:
        """Somebody is asked now."""
        self._due = time.monotonic() + AGAIN_S

    def took(self, seconds: float) -> None:
        """An answer has come."""
        self.seconds = (1 - _NEWS) * self.seconds + _NEWS * seconds if self.seconds else seconds
