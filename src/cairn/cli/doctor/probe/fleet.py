"""The registry, the engines in it or named beside it, what they answer, and what they publish."""

import asyncio
import email.utils
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, NamedTuple

from cairn.cli.doctor.facts import Clock, Engine, Publisher, Registry
from cairn.cli.events import Nowhere
from cairn.cli.up.spec import EngineSpec, names_of
from cairn.cluster import Instance, Keys, open_registry
from cairn.cluster.engine_metrics import Scrape, parse
from cairn.cluster.http import Answer, HttpError, get
from cairn.cluster.values import decode
from cairn.config import Config
from cairn.errors import ClusterError, InputError
from cairn.fleet.instances import Instance as Publishing
from cairn.fleet.instances import Limits, parse_instance
from cairn.serve.gateway.backends import parse_backend

_ANSWER_S: Final = 2.0
_LOOK_S: Final = 0.05
#: Options of `vllm serve` that KV depends on.
_OPTIONS: Final = ("--block-size", "--dtype", "--kv-cache-dtype", "--quantization", "--revision")
_SIZES: Final = ("--block-size", "--max-model-len")


class Fleet(NamedTuple):
    registry: Registry | None
    engines: tuple[Engine, ...]
    clocks: tuple[Clock, ...]
    publishers: tuple[Publisher, ...]


class _Asked(NamedTuple):
    """idle: it has computed no prompt."""

    engine: Engine
    clocks: list[Clock]
    idle: bool


async def probe_fleet(config: Config, wait_s: float) -> Fleet:
    """Asks everybody at once, then listens to publishers. Raises InputError for addresses that are none."""
    registry, instances = await _registered(config)
    instances += map(parse_backend, config.serve.backends)
    token = config.serve.backend_token.get_secret_value() if config.serve.backend_token else None
    asked = await asyncio.gather(*(_ask(one, token) for one in instances))
    clocks = [clock for one in asked for clock in one.clocks]
    clocks += [clock for one in await asyncio.gather(*map(_time_of, _plain(config))) for clock in one]
    idle = {one.engine.name for one in asked if one.idle}
    followed = [
        Publishing(one.name, events.endpoint, events.replay, rank=events.rank)
        for one in instances
        for events in one.events
    ]
    followed += map(parse_instance, config.index.instances)
    publishers = await _listen([one for one in followed if not one.bind], idle, wait_s)
    return Fleet(registry, tuple(one.engine for one in asked), tuple(clocks), publishers)


def engines_of(specs: Iterable[EngineSpec]) -> Iterator[Engine]:
    """The vLLM engines that a file of `cairn up` names, as their command lines have them."""
    for spec in specs:
        if spec.kind != "vllm":
            continue
        given = dict(pairwise(part for option in spec.options for part in option.split("=", 1)))
        traits = {name.removeprefix("--"): given.get(name, "default") for name in _OPTIONS}
        block, longest = (int(given[name]) if given.get(name, "").isdigit() else 0 for name in _SIZES)
        for name in names_of(spec):
            yield Engine(name, spec.model, traits, block, longest)


async def _registered(config: Config) -> tuple[Registry | None, list[Instance]]:
    if not config.cluster.etcd_addr:
        return None, []
    addresses = ", ".join(config.cluster.etcd_addr)
    try:
        async with open_registry(config.cluster) as registry:
            listing = await registry.range(Keys(config.cluster.namespace).instances)
    except ClusterError as error:
        return Registry(addresses, str(error)), []
    found = [decode(entry, Instance) for entry in listing.entries if entry.key.endswith("/instance")]
    return Registry(addresses, ""), [one for one in found if isinstance(one, Instance)]


async def _ask(instance: Instance, token: str | None) -> _Asked:
    """What an engine says of itself, beside what it is registered with."""
    asked_at = time.time()
    engine = Engine(instance.name, instance.model, {}, instance.block_tokens)
    try:
        models = await get(instance.http, "/v1/models", _ANSWER_S, token)
        clocks = _clocks(instance.name, models, asked_at)
        scrape = _scrape(await get(instance.http, "/metrics", _ANSWER_S, token))
    except (HttpError, InputError) as error:
        return _Asked(engine._replace(fault=str(error)), [], False)
    told = _model(models)
    block = scrape.block_tokens or instance.block_tokens
    traits = {
        "block size": str(block or ""),
        "weights": Path(str(told.get("root", ""))).name,
        "revision": scrape.says.get("revision", ""),
        "geometry": scrape.says.get("geometry", ""),
    }
    prompts, tokens = (scrape.sums.get(f"vllm:request_prompt_tokens_{part}", 0.0) for part in ("count", "sum"))
    longest = told.get("max_model_len")
    engine = engine._replace(
        model=instance.model or str(told.get("id", "")),
        traits={name: value for name, value in traits.items() if value},
        block_tokens=block,
        longest=longest if isinstance(longest, int) else 0,
        prompts=int(prompts),
        prompt_tokens=tokens / max(1.0, prompts),
    )
    return _Asked(engine, clocks, scrape.sums.get("vllm:prompt_tokens_total") == 0)


def _model(answer: Answer) -> dict[str, Any]:
    """The first model of OpenAI's list; {} if there is none."""
    try:
        return dict(json.loads(answer.body)["data"][0])
    except (ValueError, LookupError, TypeError):
        return {}


def _scrape(answer: Answer) -> Scrape:
    try:
        return parse(answer.body.decode("utf-8", "replace") if answer.status == 200 else "")
    except ValueError:
        return parse("")


async def _time_of(url: str) -> list[Clock]:
    asked_at = time.time()
    try:
        return _clocks(url, await get(url, "/health", _ANSWER_S), asked_at)
    except HttpError:
        return []


def _clocks(name: str, answer: Answer, asked_at: float) -> list[Clock]:
    """By HTTP's Date, which has whole seconds, so that what cannot be told is taken for right."""
    try:
        date = email.utils.parsedate_to_datetime(answer.date).timestamp()
    except ValueError:
        return []
    return [Clock(name, max(0.0, date - time.time()) + min(0.0, date + 1 - asked_at))]


def _plain(config: Config) -> list[str]:
    """etcd's members that answer without a certificate of ours."""
    tls = config.cluster.ca or config.cluster.cert
    addresses = [one if "://" in one else f"{'https' if tls else 'http'}://{one}" for one in config.cluster.etcd_addr]
    return [one for one in addresses if one.startswith("http://")]


async def _listen(followed: Sequence[Publishing], idle: set[str], wait_s: float) -> tuple[Publisher, ...]:
    """Until all have been heard, or the time is over."""
    if not followed:
        return ()
    from cairn.fleet.subscriber import Subscriber  # needs the extra `fleet`

    limits = Limits(replay_s=wait_s, quiet_s=wait_s, check_s=wait_s / 4)
    each = {(one.name, one.endpoint): one for one in followed}
    heard = set[tuple[str, str]]()
    async with Subscriber(Nowhere(), each.values(), limits=limits) as subscriber:
        until = time.monotonic() + wait_s
        while time.monotonic() < until and len(heard) < len(each):
            await asyncio.sleep(_LOOK_S)
            heard |= {one.instance[:2] for one in subscriber.states() if one.next is not None}
        return tuple(
            Publisher(*one.instance[:2], one.connected, one.instance[:2] in heard, one.instance.name in idle)
            for one in subscriber.states()
        )
