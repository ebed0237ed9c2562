"""The scores of a run, in a file that is whole after every prompt: a run that was stopped goes on where it was."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from cairn.cli.blend.measure import Score, Variants, quality, times
from cairn.cli.output import machine
from cairn.errors import InputError

#: Reuse without recompute, as published and behind the prelude: what a variant's KL is a share of.
BASES: Final = ("full reuse", "full reuse, prelude")
#: What is made of the scores of each part of a run.
_SUMMARIES: Final[dict[str, Callable[[Sequence[Score]], dict[str, Any]]]] = {"quality": quality, "long": times}


class Sheet:
    """Scores by part, prompt and variant. path: None: they are kept in memory only.

    asked: what they are scores of. Raises InputError for a file that holds others.
    """

    def __init__(self, path: Path | None, asked: dict[str, Any]) -> None:
        self._path = path
        self._asked = asked
        self._measured: dict[str, Any] = {}
        self.scores: dict[str, list[dict[str, Score]]] = {part: [] for part in _SUMMARIES}
        if path is None or not path.exists():
            return
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            found = {key: held[key] for key in asked}
            self._measured = held["measured"]
            for part, prompts in held["scores"].items():
                self.scores[part] = [{name: Score(*row) for name, row in one.items()} for one in prompts]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: holds no scores of blending ({error!r}); name another file") from None
        if found != asked:
            raise InputError(f"{path}: holds scores of {found}, not of {asked}; name another file")

    def lacking(self, part: str, prompt: int, variants: Variants) -> Variants:
        """Those of the variants that a prompt, one of those that are there or the next, has no scores of."""
        held = self.scores[part][prompt] if prompt < len(self.scores[part]) else {}
        return {name: blender for name, blender in variants.items() if name not in held}

    def add(self, part: str, prompt: int, scores: dict[str, Score]) -> None:
        """Takes in scores of such a prompt."""
        if prompt == len(self.scores[part]):
            self.scores[part].append({})
        self.scores[part][prompt].update(scores)
        self._measured[part] = machine()
        if self._path:
            whole = self.result() | {"scores": self.scores}
            lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in whole.items())
            draft = self._path.with_name(f".{self._path.name}")
            draft.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
            draft.replace(self._path)

    def result(self) -> dict[str, Any]:
        """What was asked, each part's figures by variant, and where and when they were measured."""
        figures: dict[str, Any] = {}
        for part, prompts in self.scores.items():
            figures[part] = {}
            for name in dict.fromkeys(name for scores in prompts for name in scores):
                rows = [scores for scores in prompts if name in scores]
                figures[part][name] = _SUMMARIES[part]([row[name] for row in rows])
                if part == "quality":
                    figures[part][name]["kl_of"] = {base: _share(rows, name, base) for base in BASES}
        return {**self._asked, **figures, "measured": self._measured}


def _share(rows: Sequence[dict[str, Score]], name: str, base: str) -> float | None:
    """A variant's KL as a share of another's over the same prompts."""
    whole = sum(row[base].kl for row in rows)
    return round(sum(row[name].kl for row in rows) / whole, 4) if whole else None
