"""Real texts of several kinds that ship with the system or with packages that Cairn needs anyway.

The calibration of SmolLM2 that ships with Cairn was measured on others: argparse.py, numpy's docstrings, and a part of
Python's language reference that is cut off here.
"""

import importlib.util
import inspect
import sysconfig
from pathlib import Path
from typing import Any, Final, NamedTuple

from cairn.errors import InputError

#: Tokens that are prefilled, and tokens after them whose logits are compared.
CONTEXT: Final = 1280
SCORED: Final = 256
WINDOW: Final = CONTEXT + SCORED

_LICENSES: Final = Path("/usr/share/common-licenses")
_MOST_CHARACTERS: Final = 120_000


class Window(NamedTuple):
    """Token ids of CONTEXT and SCORED tokens in a row, and the text they are from."""

    source: str
    ids: list[int]


def windows(tokenizer: Any, count: int) -> list[Window]:
    """`count` windows that do not overlap, texts taking turns. Raises InputError if the texts hold fewer."""
    by_source = [
        [Window(name, ids[at : at + WINDOW]) for at in range(0, len(ids) - WINDOW + 1, WINDOW)]
        for name, ids in ((name, tokenizer(text)["input_ids"]) for name, text in texts().items())
    ]
    found = [source[i] for i in range(max(map(len, by_source))) for source in by_source if i < len(source)]
    if len(found) < count:
        raise InputError(f"--windows {count}: the texts of this system hold {len(found)}; ask for fewer")
    return found[:count]


def texts() -> dict[str, str]:
    texts = {
        name: (_LICENSES / name).read_text(encoding="utf-8")
        for name in ("GPL-3", "GFDL-1.3", "MPL-2.0", "LGPL-2.1")
        if (_LICENSES / name).is_file()
    }
    if importlib.util.find_spec("pydoc_data") is not None:
        from pydoc_data.topics import topics

        texts["Python language reference"] = "\n\n".join(topics[name] for name in sorted(topics))
    texts["inspect.py"] = Path(inspect.__file__).read_text(encoding="utf-8")
    packages = Path(sysconfig.get_paths()["purelib"])
    for name, path in (
        ("torch docstrings", "torch/_tensor_docs.py"),
        ("transformers generation", "transformers/generation/utils.py"),
    ):
        if (packages / path).is_file():
            texts[name] = (packages / path).read_text(encoding="utf-8")
    return {name: text[:_MOST_CHARACTERS] for name, text in texts.items()}
