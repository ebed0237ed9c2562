"""What prompts look like: the separator of chunks, and blocks against their length."""

from collections.abc import Iterator

from cairn.cli.doctor.base import Found, Severity, check, found
from cairn.cli.doctor.facts import Boundary, Occurrences
from cairn.config import Config


@check(
    "separator-text",
    "occurrences",
    Severity.ERROR,
    why="A prompt is cut wherever the separator stands, so text that has it falls into chunks nobody meant: they "
    "never come again, and are blended where plain prefix reuse is exact.",
    fix="a separator that people do not write, and that is no Markdown or code: one of the tokenizer's special tokens",
)
def separator_text(config: Config, it: Occurrences) -> Iterator[Found]:
    """A separator of chunks that occurs naturally in sample text."""
    if it.times:
        where = ", ".join(map(str, it.lines)) + (", ..." if it.times > len(it.lines) else "")
        yield found(f"{it.separator!r} stands {it.times} times in the sample, in line {where}")


@check(
    "separator-tokens",
    "boundary",
    Severity.ERROR,
    why="Chunks are found by the separator's token ids. Where the tokenizer merges it with its neighbours these are "
    "not there, the prompt is not cut, and nothing is blended.",
    fix="a separator that stays whole between any neighbours: one of the tokenizer's special tokens",
)
def separator_tokens(config: Config, it: Boundary) -> Iterator[Found]:
    """A separator that does not tokenize to itself between other text."""
    if it.broken:
        yield found(f"{it.separator!r} loses its own tokens in {it.broken!r}")


@check(
    "block-prompt",
    "sample_tokens",
    Severity.WARNING,
    why="Only whole blocks are kept: what is shorter than one is never found again.",
    fix="engine.block_tokens: 16 (vLLM: --block-size 16)",
)
def block_prompt(config: Config, tokens: int) -> Iterator[Found]:
    """Sample text that has fewer tokens than one block, by the model's tokenizer."""
    if tokens < config.engine.block_tokens:
        yield found(f"the sample has {tokens} tokens, engine.block_tokens is {config.engine.block_tokens}")
