"""LMCache's configuration, as what it amounts to in Cairn's; what has no counterpart, and why."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple
from urllib.parse import urlencode, urlsplit

import yaml

from cairn.config import load_config
from cairn.config.keys import settings
from cairn.config.load import UNREADABLE, yaml_problem
from cairn.config.sizes import format_size
from cairn.config.urls import mask_url
from cairn.errors import InputError

_PREFIX: Final = "LMCACHE_"
#: Variables that are none of the configuration's fields.
_NO_FIELDS: Final = frozenset({"config_file", "use_experimental", "log_level", "track_usage"})


class Became(NamedTuple):
    """What became of a setting. target: Cairn's key; "": there is none. says: how, or why not."""

    name: str
    value: Any
    target: str
    says: str


class Imported(NamedTuple):
    """config: Cairn's settings by key, a valid configuration. settings: in LMCache's order."""

    config: Mapping[str, Any]
    settings: tuple[Became, ...]


class NoCounterpartError(Exception):
    """A value that Cairn has nothing for; says why."""


def read_lmcache(path: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    """LMCache's settings from its file (YAML or JSON; else the one that LMCACHE_CONFIG_FILE names), and its variables,
    which win, as they do there. Raises InputError.
    """
    if path is None and f"{_PREFIX}CONFIG_FILE" in environ:
        path = Path(environ[f"{_PREFIX}CONFIG_FILE"])
    try:
        tree = _named(yaml.safe_load(path.read_text(encoding="utf-8"))) if path else {}
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UNREADABLE as error:
        raise InputError(f"{path}: cannot be read: {yaml_problem(error)}") from None
    if not isinstance(tree or {}, dict):
        raise InputError(f"{path}: must be LMCache's configuration: names and values, in YAML")
    values = tree or {}
    given = {name.removeprefix(_PREFIX).lower(): text for name, text in environ.items() if name.startswith(_PREFIX)}
    return values | {name: _parse(text) for name, text in given.items() if name not in _NO_FIELDS}


def import_lmcache(values: Mapping[str, Any]) -> Imported:
    """Cairn's configuration for LMCache's. Raises InputError for a value that is none, ConfigError for one that Cairn
    refuses.
    """
    known = {".".join(key) for key, _ in settings()}
    config, became = dict[str, Any](), list[Became]()
    for name, value in {"max_local_cpu_size": 5.0, **values}.items():  # which is LMCache's default
        rule = _RULES.get(name)
        if value is None or rule is None or rule.target not in known:
            became.append(Became(name, value, "", "not set" if value is None else _why_not(name)))
            continue
        try:
            config[rule.target] = rule.convert(value, values)
            became.append(Became(name, value, rule.target, rule.says))
        except NoCounterpartError as error:
            became.append(Became(name, value, "", str(error)))
        except (ValueError, TypeError, OverflowError):
            raise InputError(f"{name}={value!r}: is no value that LMCache takes") from None
    if config.get("engine.timeout_s", 0) > config.get("engine.lease_s", 30):
        config["engine.lease_s"] = config["engine.timeout_s"]
    load_config(environ={}, overrides=config)
    return Imported(config, tuple(became))


def render(imported: Imported) -> str:
    """A configuration file, with what became of every setting as comments."""
    tree: dict[str, Any] = {}
    for key, value in imported.config.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return yaml.safe_dump(tree, sort_keys=False) + "\n# From LMCache's configuration:\n" + "".join(_lines(imported))


def _lines(imported: Imported) -> Iterator[str]:
    for one in imported.settings:
        what = f"# {json.dumps(one.name)[1:-1]}: {_shown(one.value)}"
        if one.target:
            yield f"{what} -> {one.target}{one.says and f' ({one.says})'}\n"
        else:
            yield f"{what} has no counterpart: {one.says}\n"


def _shown(value: Any) -> str:
    """In one line, and without what may be a secret."""
    if isinstance(value, dict):
        return f"{{{', '.join(map(repr, value))}}}"
    return json.dumps(mask_url(value) if isinstance(value, str) else value, default=str)


def _named(value: Any) -> Any:
    """What YAML has read, with names that are text, as JSON has them: YAML also makes dates of some."""
    if isinstance(value, dict):
        return {str(name): _named(one) for name, one in value.items()}
    return [_named(one) for one in value] if isinstance(value, list) else value


def _parse(text: str) -> Any:
    """A variable's value: a number, true or false, a list, a mapping; else text, as it stands."""
    try:
        return json.loads(text.lower() if text.lower() in ("true", "false") else text)
    except ValueError:
        return text


class _Rule(NamedTuple):
    """convert: from the value and all of LMCache's settings."""

    target: str
    convert: Callable[[Any, Mapping[str, Any]], Any]
    says: str = ""


def _gib(value: Any, _: Mapping[str, Any]) -> str:
    if float(value) <= 0:
        raise NoCounterpartError("a tier of no size; Cairn's DRAM cannot be switched off, its disk is where no path is")
    return format_size(int(float(value) * (1 << 30)))


def _seconds(value: Any, _: Mapping[str, Any]) -> float:
    return float(value)


def _same(value: Any, _: Mapping[str, Any]) -> Any:
    return value


def _list(value: Any, _: Mapping[str, Any]) -> list[Any]:
    if isinstance(value, str):
        return [json.loads(part) for part in value.split(",")]
    return value if isinstance(value, list) else [value]


def _path(value: Any, values: Mapping[str, Any]) -> str:
    if "," in str(value):
        raise NoCounterpartError("several directories; Cairn has one, so join them (RAID 0, LVM)")
    if not value or float(values.get("max_local_disk_size") or 0) <= 0:
        raise NoCounterpartError("without a directory and max_local_disk_size LMCache keeps nothing on disk")
    return str(value).removeprefix("file://")


def _policy(value: Any, _: Mapping[str, Any]) -> str:
    policies = {"LRU": "lru", "FIFO": "s3fifo"}
    if str(value).upper() not in policies:
        raise NoCounterpartError(
            "Cairn's are lru, s3fifo and tenure (its default, which learns how soon blocks return)"
        )
    return policies[str(value).upper()]


def _algorithm(value: Any, _: Mapping[str, Any]) -> str:
    if value not in ("naive", "cachegen"):
        raise NoCounterpartError("Cairn's are none, lossless, packed, int, fp8 and cachegen")
    return "cachegen" if value == "cachegen" else "none"


def _store(value: Any, values: Mapping[str, Any]) -> str:
    url, extra = str(value), dict(values.get("extra_config") or {})
    parts = urlsplit(url)
    if parts.scheme in ("redis", "rediss", "valkey", "valkeys"):
        return url
    if parts.scheme == "fs" and parts.path:
        return f"file://{parts.path}"
    if parts.scheme == "s3" and parts.hostname:
        cut = re.fullmatch(r"([\w-]+)\.s3[.-]([\w-]+)\.amazonaws\.com", parts.hostname)
        if cut or "." not in parts.hostname:
            bucket, region = (cut[1], cut[2]) if cut else (parts.hostname, extra.get("s3_region", ""))
            return f"s3://{bucket}{parts.path}" + (f"?region={region}" if region else "")
    if parts.scheme == "mooncakestore" and parts.port and extra.get("metadata_server"):
        names = {
            "metadata": "metadata_server",
            "protocol": "protocol",
            "device": "device_name",
            "host": "local_hostname",
        }
        options = {name: extra[theirs] for name, theirs in names.items() if extra.get(theirs)}
        return f"mooncake://{parts.netloc}?{urlencode(options, safe=':/')}"
    raise NoCounterpartError(
        f"no store for {mask_url(url)}; Cairn's are valkey, s3, mooncake and file (docs/remote.md)"
    )


_RULES: Final = {
    "max_local_cpu_size": _Rule("storage.cpu.size", _gib),
    "local_disk": _Rule("storage.disk.path", _path),
    "max_local_disk_size": _Rule("storage.disk.size", _gib, "exact, and preallocated"),
    "remote_url": _Rule("storage.remote.url", _store, "its objects are not read: Cairn's have names of their own"),
    "remote_serde": _Rule("compression.algorithm", _algorithm),
    "cache_policy": _Rule("storage.cpu.policy", _policy),
    "blocking_timeout_secs": _Rule("engine.timeout_s", _seconds, "a deadline; past it the request recomputes"),
    "pin_timeout_sec": _Rule("engine.lease_s", _seconds),
    "lookup_timeout_ms": _Rule("storage.remote.lookup_timeout_s", lambda value, _: float(value) / 1000),
    "enable_kv_events": _Rule("engine.enable_service_routing", _same),
    "enable_blending": _Rule("blending.enabled", _same),
    "blend_special_str": _Rule("blending.special_str", _same),
    "blend_recompute_ratios": _Rule("blending.recompute_ratios", _list),
    "blend_check_layers": _Rule("blending.check_layers", _list),
}

#: By what names begin with; the first that fits.
_WHY_NOT: Final[dict[tuple[str, ...], str]] = {
    ("chunk_size",): "the engine's own blocks are kept (vLLM's --block-size); storage.remote.object_size cuts objects",
    ("local_cpu_use", "max_local", "reserve_local", "enable_lazy", "lazy_"): "nothing to set: the arena is taken whole "
    "at the start, in huge pages where the kernel gives them",
    ("local_cpu",): "DRAM is always on; storage.cpu.size says how much",
    ("local_disk_path_sharding",): "one directory holds all ranks",
    ("save_decode_cache",): "blocks of answers are kept like those of prompts",
    ("save_unfull_chunk",): "only whole blocks are kept, of 16 tokens and not of 256",
    ("pre_caching_hash_algorithm",): "keys are BLAKE2s chains, equal in every process without PYTHONHASHSEED",
    (
        "use_layerwise",
        "enable_async",
        "min_retrieve",
        "use_gpu_connector",
    ): "nothing to set: measured costs decide what is loaded, when, and whether layer by layer",
    ("numa_mode",): "start the engine under numactl",
    ("blend_", "enable_blending"): "blending has no such setting in this version",
    (
        "enable_pd",
        "pd_",
        "nixl_",
        "enable_xpyd",
        "transfer_channel",
    ): "`cairn serve` sends prefill and decode to engines by their role; KV goes by a shared node or remote store",
    ("enable_p2p", "p2p_", "peer_", "mp_"): "engines of a host share a node (node.address), and nodes of several hosts "
    "read from each other (node.peers)",
    ("enable_controller", "controller_", "lmcache_"): "`cairn register` and cluster.etcd_addr make engines known",
    ("external_lookup",): "`cairn index` follows KV events and answers who holds what",
    ("internal_api", "enable_chunk_stat", "chunk_stat"): "metrics are on vLLM's /metrics; see `cairn inspect`, too",
    ("gds_", "use_gds", "cufile_"): "blocks go from disk to DRAM by O_DIRECT; set storage.disk.path",
    ("extra_config",): "settings of LMCache's backends; what a URL of Cairn's needs was taken out of it",
    ("storage_plugins", "remote_storage_plugins"): "a store of your own is an entry point `cairn.stores` (remote.md)",
    ("",): "Cairn has nothing like it",
}


def _why_not(name: str) -> str:
    return next(why for prefixes, why in _WHY_NOT.items() if name.startswith(prefixes))
