"""Engines beside each other, the registry that they are in, and the KV events that they publish."""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Final

from cairn.cli.doctor.base import Found, Severity, check, found
from cairn.cli.doctor.facts import Clock, Engine, Publisher, Registry
from cairn.config import Config

#: Prefill of so few tokens takes about as long as asking a store over the network.
_SHORT_PROMPT: Final = 256
#: Requests that an average is believed from.
_ENOUGH: Final = 10
_SKEW_S: Final = 2.0


@check(
    "registry-unreachable",
    "registry",
    Severity.ERROR,
    why="Nobody is found and nobody is told: the service has no engines, and engines cannot register.",
    fix="start etcd, or mend cluster.etcd_addr",
)
def registry_unreachable(config: Config, registry: Registry) -> Iterator[Found]:
    """etcd that does not answer within cluster.timeout_s."""
    if registry.fault:
        yield found(f"{registry.addresses}: {registry.fault}")


@check(
    "engine-unreachable",
    "engines",
    Severity.ERROR,
    why="The service cannot send requests there.",
    fix="start the engine, or mend its address in serve.backends or at `cairn register --http`",
)
def engine_unreachable(config: Config, engines: Sequence[Engine]) -> Iterator[Found]:
    """An engine, registered or named, that does not answer."""
    for one in engines:
        if one.fault:
            yield found(f"{one.name}: {one.fault}")


@check(
    "engines-differ",
    "engines",
    Severity.ERROR,
    why="Weights, dtype and block size are part of every block's name, so engines that differ share nothing, "
    "though one name stands for both; and a client gets one model's answers or the other's.",
    fix="the same {trait} for all engines of {model} (engine.model_revision names weights that are copies of each "
    "other), or another served name (--served-model-name)",
)
def engines_differ(config: Config, engines: Sequence[Engine]) -> Iterator[Found]:
    """Engines of one model name with different block sizes, weights, revisions of them, geometries or dtypes."""
    seen: dict[tuple[str, str], dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for one in engines:
        for trait, value in one.traits.items():
            if one.model:
                seen[one.model, trait][value].append(one.name)
    for (model, trait), values in seen.items():
        if len(values) > 1:
            each = ", ".join(f"{value} ({' '.join(names)})" for value, names in values.items())
            yield found(f"{trait} of {model}: {each}", trait=trait, model=model)


@check(
    "block-size",
    "engines",
    Severity.WARNING,
    why="vLLM decides its own block size. What this configuration runs elsewhere (Transformers, CacheEngine) cuts "
    "prompts otherwise, and blocks of one are never found by the other.",
    fix="engine.block_tokens: {tokens}",
)
def block_size(config: Config, engines: Sequence[Engine]) -> Iterator[Found]:
    """engine.block_tokens, where it is set, other than the block size that engines report."""
    own = config.engine.block_tokens
    other = next((one for one in engines if one.block_tokens not in (0, own)), None)
    if "block_tokens" in config.engine.model_fields_set and other:
        text = f"engine.block_tokens is {own}, {other.name} has blocks of {other.block_tokens}"
        yield found(text, tokens=other.block_tokens)


@check(
    "short-prompts",
    "engines",
    Severity.WARNING,
    why="So little is computed sooner than it is asked for: each request waits for a lookup in the remote store (up to "
    "storage.remote.lookup_timeout_s), and its blocks fill store and network for nothing.",
    fix="storage.remote.url: null, or storage.remote.admission: second_touch",
)
def short_prompts(config: Config, engines: Sequence[Engine]) -> Iterator[Found]:
    """Short prompts, by the engines' metrics, with every tier on."""
    if config.storage.remote.url is None:
        return
    for one in engines:
        if one.prompts >= _ENOUGH and one.prompt_tokens < _SHORT_PROMPT:
            yield found(
                f"{one.name}: {one.prompt_tokens:.0f} tokens a prompt ({one.prompts:,} requests), a remote tier"
            )


@check(
    "clock-skew",
    "clocks",
    Severity.WARNING,
    why="Load reports look stale or from the future, logs do not line up, and S3 refuses requests that are 15 minutes "
    "off. (Leases and deadlines do not suffer: they use monotonic clocks.)",
    fix="timedatectl set-ntp true, here and there",
)
def clock_skew(config: Config, clocks: Sequence[Clock]) -> Iterator[Found]:
    """A clock, of an engine or of etcd, that is more than 2 s off ours, by HTTP's Date."""
    for one in clocks:
        if abs(one.ahead_s) > _SKEW_S:
            yield found(
                f"{one.name} is {abs(one.ahead_s):.0f} s {'ahead of' if one.ahead_s > 0 else 'behind'} this machine"
            )


@check(
    "events-silent",
    "publishers",
    Severity.WARNING,
    why="The index never learns what this engine holds, so requests go there by chance; unless it just had nothing to "
    "do: then send a prompt and look again.",
    fix='vLLM: --kv-events-config \'{{"enable_kv_cache_events": true, "endpoint": "tcp://*:{port}"}}\' (it binds only '
    "where a * stands; with replay_endpoint, too, what was published before is seen)",
)
def events_silent(config: Config, publishers: Sequence[Publisher]) -> Iterator[Found]:
    """A KV event endpoint where nobody listens, or that says nothing in --wait seconds and has nothing to replay."""
    for one in publishers:
        if one.connected and (one.heard or one.idle):
            continue
        what = "has published nothing" if one.connected else "is nobody's"
        yield found(f"{one.name}: {one.endpoint} {what}", port=one.endpoint.rpartition(":")[2])
