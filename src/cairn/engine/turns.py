"""Which of what was begun is not over yet, so that somebody may wait for it and not for what comes behind."""


class Turns:
    """Pieces of work by the turn they belong to. For whoever holds its owner's lock."""

    def __init__(self) -> None:
        self.latest = 0
        self._pieces: dict[int, int] = {}  # a turn's unfinished pieces; the oldest turn first

    def begin(self, turn: int | None = None) -> int:
        """Another piece of a turn that is not over, or the first of a new one; returns which."""
        if turn is None:
            turn = self.latest = self.latest + 1
        self._pieces[turn] = self._pieces.get(turn, 0) + 1
        return turn

    def end(self, turn: int) -> None:
        """A piece of it is done, or given up."""
        self._pieces[turn] -= 1
        if not self._pieces[turn]:
            del self._pieces[turn]

    def over(self, latest: int) -> bool:
        """Whether all turns up to this one are."""
        return next(iter(self._pieces), latest + 1) > latest
