"""Probes: they find out, and judge nothing."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from cairn.cli.doctor.facts import Facts
from cairn.cli.doctor.probe.fleet import engines_of, probe_fleet
from cairn.cli.doctor.probe.host import probe_host
from cairn.cli.doctor.probe.model import probe_model, probe_text
from cairn.cli.doctor.probe.storage import probe_disk, probe_remote
from cairn.cli.up.spec import ClusterSpec
from cairn.config import Config

_SEED = "PYTHONHASHSEED"


class Given(NamedTuple):
    """What a user hands over beside the configuration. wait_s: how long publishers are listened to."""

    cluster: ClusterSpec | None = None
    model: Path | None = None
    sample: Path | None = None
    separator: str | None = None
    wait_s: float = 3.0


def gather(config: Config, given: Given, environ: Mapping[str, str]) -> Facts:
    """Looks at everything there is, for some seconds. Raises InputError for what was handed over and is unusable."""
    specs = given.cluster.engines if given.cluster else ()
    fleet = asyncio.run(probe_fleet(config, given.wait_s))
    seeds = {spec.name: spec.environ[_SEED] for spec in specs if _SEED in spec.environ}
    seeds |= {"here": environ[_SEED]} if _SEED in environ else {}
    tokenizer = given.model or config.serve.tokenizer_path or next(iter(config.index.models.values()), None)
    return Facts(
        config=config,
        host=probe_host(),
        seeds=seeds,
        disk=probe_disk(config.storage.disk),
        remote=probe_remote(config),
        model=probe_model(given.model, config.engine.block_tokens) if given.model else None,
        text=probe_text(given.sample, given.separator, str(tokenizer) if tokenizer else None),
        registry=fleet.registry,
        engines=(*fleet.engines, *engines_of(specs)),
        clocks=fleet.clocks,
        publishers=fleet.publishers,
    )
