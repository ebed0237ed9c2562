"""vLLM's plugin: lets a worker's connector, which vLLM gives only a paged cache, find the model that writes it.

vLLM calls `register` in every process before it builds a model (entry point group `vllm.general_plugins`). It asks
torch to tell when a module gets its layers, and remembers that module weakly: no class of vLLM's is replaced, so that
nothing that vLLM keys by a model's class (inspection, compilation, adapters) changes, and it costs engines that do not
blend nothing.
"""

from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

from torch.nn import Module, ModuleList
from torch.nn.modules.module import register_module_module_registration_hook

_bodies: "WeakSet[Module]" = WeakSet()
_registered = False


def register() -> None:
    """From now on this process's models are remembered. Idempotent."""
    global _registered
    if not _registered:
        _registered = True
        register_module_module_registration_hook(_remember)


def body_with(attentions: Sequence[Any]) -> Any:
    """The module, of those made since `register`, whose layers have these attentions, in this order; None if there is
    none.
    """
    for body in _bodies:
        found = [getattr(getattr(layer, "self_attn", None), "attn", None) for layer in body.layers]
        if len(found) == len(attentions) and all(a is b for a, b in zip(found, attentions, strict=True)):
            return body
    return None


def _remember(module: Module, name: str, child: Module | None) -> None:
    if name == "layers" and isinstance(child, ModuleList):
        _bodies.add(module)
