"""Probes: they find out, and judge nothing."""

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from cairn.cli.doctor.facts import Facts, Model
from cairn.cli.doctor.probe.fleet import engines_of, probe_fleet
from cairn.cli.doctor.probe.host import probe_host
from cairn.cli.doctor.probe.model import boundary, occurrences, probe_model, read_sample
from cairn.cli.doctor.probe.storage import probe_disk, probe_remote
from cairn.cli.up.spec import ClusterSpec
from cairn.config import Config

_SEED = "PYTHONHASHSEED"


class Given(NamedTuple):
    """What a user hands over beside the configuration. separator: None: that of `blending`, if it is enabled. wait_s:
    how long publishers are listened to.
    """

    cluster: ClusterSpec | None = None
    model: Path | None = None
    sample: Path | None = None
    separator: str | None = None
    wait_s: float = 3.0


def gather(config: Config, given: Given, environ: Mapping[str, str]) -> Facts:
    """Looks at everything there is, for some seconds. Raises InputError for what was handed over and is unusable."""
    specs = given.cluster.engines if given.cluster else ()
    fleet = asyncio.run(probe_fleet(config, given.wait_s))
    engines = (*fleet.engines, *engines_of(specs))
    seeds = {spec.name: spec.environ[_SEED] for spec in specs if _SEED in spec.environ}
    return Facts(
        config=config,
        host=probe_host(),
        seeds=seeds | ({"here": environ[_SEED]} if _SEED in environ else {}),
        disk=probe_disk(config.storage.disk),
        remote=probe_remote(config),
        model=_model(config, given.model, max((one.longest for one in engines), default=0)) if given.model else None,
        registry=fleet.registry,
        engines=engines,
        clocks=fleet.clocks,
        publishers=fleet.publishers,
    )._replace(**_text(config, given))


def _model(config: Config, path: Path, longest: int) -> Model:
    """longest: what engines take; 0: not known."""
    model = probe_model(path, config)
    return model._replace(longest=min(model.longest, longest or model.longest))


def _text(config: Config, given: Given) -> dict[str, Any]:
    """What can be said of the sample and the separator, as far as there are these, and a tokenizer."""
    found: dict[str, Any] = {}
    text = read_sample(given.sample) if given.sample else None
    name = given.model or config.serve.tokenizer_path or next(iter(config.index.models.values()), None)
    separator = given.separator or (config.blending.special_str if config.blending.enabled else None)
    if separator and text is not None:
        found["occurrences"] = occurrences(separator, text)
    if name and (separator or text is not None):
        from cairn.serve.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(str(name))
        found["boundary"] = boundary(separator, text or "", tokenizer) if separator else None
        found["sample_tokens"] = len(tokenizer.text(text, special=False)) if text is not None else None
    return found
