"""The fleet's view: which instance holds which blocks in which tier, told by engines' KV events, asked by routers."""

from cairn.fleet.base import Cleared, Event, Removed, Source, Stored, Tier
from cairn.fleet.index import FleetIndex, Stats
from cairn.fleet.match import Match
from cairn.fleet.score import Score, SecondsSaved, score
from cairn.fleet.speculation import Speculation

__all__ = [
    "Cleared",
    "Event",
    "FleetIndex",
    "Match",
    "Removed",
    "Score",
    "SecondsSaved",
    "Source",
    "Speculation",
    "Stats",
    "Stored",
    "Tier",
    "score",
]
