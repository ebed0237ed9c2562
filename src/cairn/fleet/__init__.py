"""The fleet's view: which instance holds which blocks in which tier, told by engines' KV events, asked by routers.

Where to begin: `base` (events as values, the sink that takes them in), then `index` (`FleetIndex`: events in, matches
out). Everything else is on one of four ways:

- From the wire to events: `instances` (whom to follow) -> `subscriber` -> `feed` (one publisher: gaps, restarts, with
  `messages`, `replay` and `sockets`) -> `track` (how far it is) -> `events` (the decoder; `wire`: messages typed,
  `scan` and `plain`: the same as arrays, in kernels over `msgpack`; `separation`: LoRA, salts, pictures). `discovery`
  finds instances in the cluster; `publisher` and `recording` are the other direction.
- From events to the index: `chains` (tokens to keys) -> `storing` (what a `BlockStored` does) on `blocks` (records),
  `names` (what a source calls them, and in how many copies) and `holders` (sets of who holds them). `ledger` owns all
  of it, its room and its locks (`fair`).
- From the index to answers: `match` (a walk along a chain), `score`, `speculation` (what was routed just now).
- Across restarts: `copying` (a source at one moment), `snapshot` and `snapshot_format`, `positions`, `keeper` and
  `draft` (files), `replica` and `shared_store` (Valkey).
"""

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
