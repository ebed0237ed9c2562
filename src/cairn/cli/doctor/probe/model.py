"""A model's directory, and what its tokenizer makes of sample text and of the separator."""

import json
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

from cairn.cli.doctor.facts import Model, Text
from cairn.errors import InputError
from cairn.kv import KVGeometry

if TYPE_CHECKING:
    from cairn.serve.tokenizer import Tokenizer

#: What may stand around a separator, beside what the sample has.
_NEIGHBOURS: Final = ("The end.", "Begin", "\n", " ", "#", "1.", "a", "\n\n")
_SAMPLE_BYTES: Final = 16 << 20


def probe_model(path: Path, block_tokens: int) -> Model:
    """Raises InputError for what is no model's directory, or a model that Cairn refuses."""
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = SimpleNamespace(**(fields.get("text_config") or fields))
        dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
        geometry = KVGeometry.from_hf(config, dtype=dtype, block_tokens=block_tokens)
        return Model(geometry, int(getattr(config, "max_position_embeddings", 0)))
    except (OSError, ValueError, AttributeError, TypeError) as error:  # GeometryError is a ValueError
        raise InputError(f"--model {path}: {error}; name a directory with the model's config.json") from None


def probe_text(sample: Path | None, separator: str | None, tokenizer_name: str | None) -> Text | None:
    """tokenizer_name: a directory, or a name on the hub. Raises InputError for what cannot be read."""
    if sample is None and not separator:
        return None
    text = _read(sample) if sample else ""
    lines, broken, tokens = list[int](), "", None
    if separator:
        starts = (part.count("\n") for part in text.split(separator)[:-1])
        here = separator.count("\n")
        at = 1
        for count in starts:
            at += count
            lines.append(at)
            at += here
    if tokenizer_name:
        from cairn.serve.tokenizer import Tokenizer

        tokenizer = Tokenizer.load(tokenizer_name)
        tokens = len(tokenizer.text(text, special=False)) if sample else None
        broken = _broken(tokenizer, separator, text) if separator else ""
    return Text(separator or "", tuple(lines), tokens, broken)


def _broken(tokenizer: "Tokenizer", separator: str, text: str) -> str:
    own = tokenizer.text(separator, special=False).tolist()
    for left, right in _surroundings(text):
        around = left + separator + right
        if not _contains(tokenizer.text(around, special=False).tolist(), own):
            return around
    return ""


def _surroundings(text: str) -> Iterator[tuple[str, str]]:
    yield "", ""
    yield from ((left, right) for left in _NEIGHBOURS for right in _NEIGHBOURS)
    words = text.split()[:200]
    yield from pairwise(words)


def _contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))


def _read(path: Path) -> str:
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise InputError(f"--sample {path}: cannot be read: {error.strerror}") from None
