"""Blending: chunks of text are reused wherever they stand in a prompt. See `cairn.blend.base` for the idea."""

from cairn.blend.attention import attend
from cairn.blend.base import BlendError, BlendModel, Canvas, Piece, Planes, Projected, Rope
from cairn.blend.checked import recipe_of
from cairn.blend.chunks import ChunkLoad, ChunkStore, Found
from cairn.blend.forward import Recipe, blend
from cairn.blend.rotation import Turn
from cairn.blend.split import join, prelude_of, separator_of, split
from cairn.blend.supported import FIXED_ROPES, refuse_blending

__all__ = [
    "FIXED_ROPES",
    "BlendError",
    "BlendModel",
    "Canvas",
    "ChunkLoad",
    "ChunkStore",
    "Found",
    "Piece",
    "Planes",
    "Projected",
    "Recipe",
    "Rope",
    "Turn",
    "attend",
    "blend",
    "join",
    "prelude_of",
    "recipe_of",
    "refuse_blending",
    "separator_of",
    "split",
]
