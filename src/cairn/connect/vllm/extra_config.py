"""Settings as vLLM hands them over: `kv_connector_extra_config`."""

from typing import Any

from cairn.config import Config, load_config
from cairn.errors import ConfigError

#: Settings of the engine that may stand bare, as vLLM's users write flags.
FLAGS = ("enable_service_routing", "enable_cache_upload", "enable_disagg_pd")


def config_of(extra: dict[str, Any]) -> Config:
    """The configuration: `config` names a YAML file; FLAGS may stand bare or below `engine`; every other key is a
    setting, dotted or nested. What stands here wins over the file and the environment.

    Raises ConfigError, in one line, for a key that is none (it names the nearest), one that stands twice, or a value
    that breaks its rule.
    """
    settings = dict(extra)
    path = settings.pop("config", None)
    for flag in FLAGS:
        if flag in settings:
            key = f"engine.{flag}"
            nested = settings.get("engine")
            if key in settings or (isinstance(nested, dict) and flag in nested):
                raise ConfigError(f"{flag} and {key}: must stand once; take one out")
            settings[key] = settings.pop(flag)
    config = load_config(path, overrides=settings)
    if config.engine.enable_disagg_pd and not (config.node.address or config.storage.remote.url):
        raise ConfigError(
            "engine.enable_disagg_pd: prefill and decode instances hand over what both can reach; set node.address or "
            "storage.remote.url, the same for all"
        )
    return config
