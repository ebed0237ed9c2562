"""vLLM: a KV connector. `kv_connector="CairnConnector"`, `kv_connector_module_path="cairn.connect.vllm"`.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "CairnConnector", "kv_role": "kv_both",
        "kv_connector_module_path": "cairn.connect.vllm"}'

The scheduler's process owns the engine: index, planner, tiers. Workers map its arena and copy between it and their
paged caches; a row of the arena holds a block of all ranks, each rank's shard in its own part, so a block that can be
found is there for every rank. See docs/vllm.md.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cairn.connect.vllm.connector import CairnConnector

__all__ = ["CairnConnector"]


def __getattr__(name: str) -> Any:
    # When asked for: what of this package is not vLLM's interface works, and is tested, without vLLM.
    if name == "CairnConnector":
        from cairn.connect.vllm.connector import CairnConnector

        return CairnConnector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
