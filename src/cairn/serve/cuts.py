"""Where a text may be cut so that its pieces' tokens are together its own: before tokens of chat templates.

A fast tokenizer first takes its added tokens out of a text, and then looks at what lies between them one by one. So
what stands before such a token is tokenized as if nothing followed, and turns of a chat that were said before need not
be tokenized again.
"""

import re
from typing import Any


class Cuts:
    """The cuts of one tokenizer. Thread-safe."""

    def __init__(self, tokenizer: Any) -> None:
        """tokenizer: of the package `tokenizers`."""
        added = tokenizer.get_added_tokens_decoder().values()
        # In the order in which the tokenizer looks: the leftmost, of these the longest. Those that are looked for in
        # normalized text come later, between the others.
        first = sorted((one for one in added if not one.normalized), key=lambda one: len(one.content), reverse=True)
        # One that takes blanks along, or may be taken along as one, is not told by what begins with it.
        self._cuts = frozenset(one.content for one in first if not one.lstrip and not one.content[0].isspace())
        # Words that must stand alone look at what follows them; where these are words as any, nothing is taken out.
        usable = self._cuts and not tokenizer.encode_special_tokens and not any(one.single_word for one in added)
        self._added = re.compile("|".join(re.escape(one.content) for one in first)) if usable else None

    def pieces(self, text: str) -> list[str]:
        """The text in pieces, to be tokenized without the special tokens that begin or end a whole."""
        if self._added is None:
            return [text]
        starts = [found.start() for found in self._added.finditer(text) if found[0] in self._cuts]
        ends = [start for start in starts if start] + [len(text)]
        return [text[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
