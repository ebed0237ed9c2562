"""Pins of the autopilot, and presets: what one scenario alone would be set to."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Final, Literal

from pydantic import Field, model_validator

from cairn.config.types import Section

#: auto: as measured; always, never: whatever was measured.
Pin = Literal["auto", "always", "never"]
Preset = Literal["auto", "chat", "rag", "multi-turn", "disaggregated", "shared"]


def _pins(*always: str) -> Mapping[str, Pin]:
    pinned = ("load", "blend", "layerwise", "store", "disk", "remote", "codec")
    return MappingProxyType({name: "always" if name in always else "never" for name in pinned})


#: The scenario table: what each preset pins; auto pins nothing.
PRESETS: Final[Mapping[Preset, Mapping[str, Pin]]] = MappingProxyType(
    {
        "auto": MappingProxyType({}),
        "chat": _pins("load", "store"),
        "rag": _pins("load", "store", "blend", "layerwise", "disk"),
        "multi-turn": _pins("load", "store", "layerwise", "disk"),
        "disaggregated": _pins("load", "store", "layerwise", "remote"),
        "shared": _pins("load", "store", "disk", "remote", "codec"),
    }
)


class Autopilot(Section):
    """What is decided for each request from measured costs, and what is not: see autopilot.md."""

    preset: Preset = Field(
        default="auto", description="Pins everything as one scenario wants it; pins that are set win. auto: none."
    )
    load: Pin = Field(default="auto", description="Load what tiers hold of a prompt.")
    blend: Pin = Field(default="auto", description="Blend prompts, where `blending.enabled` permits it.")
    layerwise: Pin = Field(
        default="auto", description="Load while the model computes, layer by layer; Transformers: store so, too."
    )
    store: Pin = Field(default="auto", description="Store what is computed.")
    disk: Pin = Field(default="auto", description="Write what is stored to disk, if there is one.")
    remote: Pin = Field(default="auto", description="Write what is stored to the remote store, if there is one.")
    codec: Pin = Field(
        default="auto",
        description="Compress as `compression` says; auto: more exactly, or not, where that loads as fast.",
    )

    @model_validator(mode="before")
    @classmethod
    def _take_preset(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        preset: Any = str(given.get("preset", "auto"))  # an unknown one is refused as any other value is
        return {**PRESETS.get(preset, {}), **given}
