"""The text that the demo asks about, and the prompts made of it."""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from cairn.errors import InputError

#: More than any prompt needs; the rest of a longer file is not read.
MOST_CHARACTERS = 1 << 20


class Text(NamedTuple):
    """A text with where it comes from, under which licence, and questions about it."""

    content: str
    title: str
    license: str
    questions: tuple[str, ...]


GPL = Path("/usr/share/common-licenses/GPL-3")

_GPL_QUESTIONS = (
    "Does the license allow you to charge money for copies?",
    'What does it mean to "propagate" a work?',
    "Does this license offer any warranty for the program?",
)
_PYTHON_QUESTIONS = (
    "What does the assert statement do?",
    "What is an assignment statement used for?",
    "What are keywords and identifiers?",
)
_ANY_QUESTIONS = (
    "What is this text about?",
    "What is the most important point of this text?",
    "For whom was this text written?",
)


def load_text(file: Path | None) -> Text:
    """`file`, or else a long text that ships with Debian or with Python itself.

    Raises InputError for a file that cannot be read, is empty or is no UTF-8 text.
    """
    if file is not None:
        return Text(_read(file), str(file), "yours", _ANY_QUESTIONS)
    if GPL.is_file():
        return Text(_read(GPL), f"GNU General Public License v3 ({GPL})", "verbatim copying permitted", _GPL_QUESTIONS)
    return Text(_python_topics(), "Python's language reference (pydoc_data.topics)", "PSF-2.0", _PYTHON_QUESTIONS)


def build_prompts(tokenizer: Any, text: str, questions: Sequence[str], tokens: int) -> tuple[list[list[int]], int]:
    """Chat prompts as token ids, the longest of at most `tokens`, and how many tokens of the text they hold.

    All of them start with the same part of the text and differ in the question after it. Raises InputError when there
    is no room for any text.
    """
    room = tokens - max(len(_chat(tokenizer, "", question)) for question in questions)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ends = [end for _, end in encoded["offset_mapping"]]
    while room > 0:
        held = min(room, len(ends))
        prompts = [_chat(tokenizer, text[: ends[held - 1]], question) for question in questions]
        excess = max(map(len, prompts)) - tokens
        if excess <= 0:
            return prompts, held
        # Tokens at the seams may split differently than they did alone.
        room -= excess
    raise InputError(f"--tokens {tokens}: no room for any text beside the questions; ask for more tokens")


def _chat(tokenizer: Any, text: str, question: str) -> list[int]:
    content = f"{text}\n\nQuestion: {question} Answer in one sentence."
    message = [{"role": "user", "content": content}]
    return list(tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)["input_ids"])


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            content = stream.read(MOST_CHARACTERS)
    except OSError as error:
        raise InputError(f"--text {file}: {error.strerror}; name a readable text file") from error
    except UnicodeDecodeError as error:
        raise InputError(f"--text {file}: not UTF-8 at byte {error.start}; name a text file") from error
    if not content.strip():
        raise InputError(f"--text {file}: empty; name a file with text in it")
    return content


def _python_topics() -> str:
    if importlib.util.find_spec("pydoc_data") is None:
        raise InputError("this system has neither the GPL nor Python's documentation; name a text with --text FILE")
    from pydoc_data.topics import topics

    return "\n\n".join(topics[name] for name in sorted(topics))[:MOST_CHARACTERS]
