"""LoRA adapters: what tells the KV of one from that of another."""

from pathlib import Path
from typing import Any

import msgspec


class Adapters:
    """Names adapters by their files. Called by the scheduler's loop alone.

    A worker reads an adapter's files when it first needs it, and again after it was displaced, and tells nobody. So
    files that have changed under an adapter's number since it was first asked for leave open which weights are at
    work: from then on its requests are not served.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[int, str, str], str | None] = {}

    def identity(self, adapter: Any) -> str | None:
        """ "" without an adapter; None for one whose weights are not known for sure."""
        if adapter is None:
            return ""
        number = (adapter.lora_int_id, adapter.lora_name, adapter.lora_path)
        found = _files(adapter.lora_path)
        first = self._seen.setdefault(number, found) if found else None
        if first != found:
            self._seen[number] = first = None
        return first and msgspec.json.encode([adapter.lora_name, adapter.lora_path, first]).decode()


def _files(path: str) -> str | None:
    """Names, sizes and times of an adapter's files; None if they are not at hand."""
    home = _home(path)
    files = sorted(file for file in home.glob("*") if file.is_file()) if home else []
    try:
        stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    except OSError:  # somebody puts others there right now
        return None
    return msgspec.json.encode(stats).decode() if stats else None


def _home(path: str) -> Path | None:
    """Where an adapter lies: the directory itself, or the hub's copy of it, once a worker has fetched it."""
    home = Path(path).expanduser()
    if home.is_dir():
        return home
    from huggingface_hub import try_to_load_from_cache

    config = try_to_load_from_cache(path, "adapter_config.json") if path.count("/") == 1 else None
    return Path(config).parent if isinstance(config, str) else None
