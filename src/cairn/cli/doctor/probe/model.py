"""A model's directory, and what its tokenizer makes of sample text and of the separator."""

import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice, pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Final

from cairn.cli.doctor.facts import Boundary, Model, Occurrences
from cairn.codec.quantized import quantizer_for
from cairn.config import Config
from cairn.errors import InputError
from cairn.kv import KVGeometry
from cairn.tier.arena import PAGE
from cairn.tier.dram import round_up

if TYPE_CHECKING:
    from cairn.serve.tokenizer import Tokenizer

#: What may stand around a separator, beside what the sample has.
_NEIGHBOURS: Final = ("The end.", "Begin", "\n", " ", "#", "1.", "a", "\n\n")
#: Characters of the sample whose words are tried as well; bytes that are read of it; lines that are named.
_WORDS_OF: Final = 2000
_SAMPLE_BYTES: Final = 16 << 20
_SHOWN: Final = 5


def probe_model(path: Path, config: Config) -> Model:
    """Raises InputError for what is no model's directory, or a model that Cairn refuses."""
    tokens, codec = config.engine.block_tokens, config.storage.cpu.codec
    try:
        fields = json.loads((path / "config.json").read_text(encoding="utf-8"))
        told = SimpleNamespace(**(fields.get("text_config") or fields))
        dtype = str(fields.get("dtype") or fields.get("torch_dtype") or "bfloat16")
        geometry = KVGeometry.from_hf(told, dtype=dtype, block_tokens=tokens)
        quantizer = quantizer_for(geometry, codec)
        row = round_up((quantizer.stored if quantizer else geometry).block_bytes, PAGE)
        return Model(tokens, row, int(getattr(told, "max_position_embeddings", 0)))
    except (OSError, ValueError, AttributeError, TypeError) as error:  # GeometryError is a ValueError
        raise InputError(f"--model {path}: {error}; name a directory with the model's config.json") from None


def occurrences(separator: str, text: str) -> Occurrences:
    starts = (match.start() for match in re.finditer(re.escape(separator), text))
    lines = (1 + text.count("\n", 0, start) for start in starts)
    return Occurrences(separator, text.count(separator), tuple(islice(lines, _SHOWN)))


def boundary(separator: str, text: str, tokenizer: "Tokenizer") -> Boundary:
    """text: whose words are tried as neighbours, beside some of our own."""
    own = tokenizer.text(separator, special=False).tolist()
    for left, right in _surroundings(text):
        around = left + separator + right
        if not _contains(tokenizer.text(around, special=False).tolist(), own):
            return Boundary(separator, around)
    return Boundary(separator, "")


def _surroundings(text: str) -> Iterator[tuple[str, str]]:
    yield "", ""
    yield from ((left, right) for left in _NEIGHBOURS for right in _NEIGHBOURS)
    yield from pairwise(text[:_WORDS_OF].split())


def _contains(tokens: Sequence[int], part: Sequence[int]) -> bool:
    return any(tokens[i : i + len(part)] == part for i in range(len(tokens) - len(part) + 1))


def read_sample(path: Path) -> str:
    """Raises InputError."""
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            return file.read(_SAMPLE_BYTES)
    except OSError as error:
        raise InputError(f"--sample {path}: cannot be read: {error.strerror}") from None
