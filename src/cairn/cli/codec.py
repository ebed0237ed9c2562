"""`cairn codec`: what compression needs to know about a model."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from cairn.cli.output import check_writable, help_if_alone

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Compression of KV: calibrate it to a model.",
)


@app.command()
def calibrate(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A model in Hugging Face format.")],
    text: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A text like those the model will see.")],
    out: Annotated[Path, typer.Option(help="The file to write.")] = Path("calibration.json"),
    windows: Annotated[int, typer.Option(min=1, max=64, help="Parts of the text, 1,536 tokens each.")] = 3,
) -> None:
    """Measure what noise in each layer's K and V costs a model, on the CPU. Takes a forward pass of 256 tokens a layer,
    plane and window, of half the layers on average. Says how far it is, and how long it still takes.

    \b
    Example:
      cairn codec calibrate ./SmolLM2-135M-Instruct book.txt --out smollm2.json
    """
    from cairn.cli.demo.model import open_model
    from cairn.cli.quality.calibrate import calibrate as run

    check_writable(out, "--out")
    made = run(
        *open_model(model),
        text.read_text(encoding="utf-8", errors="replace"),
        name=model.resolve().name,
        windows=windows,
        tick=_progress(),
    )
    made.save(out)
    typer.echo(f"{out}: {len(made.sensitivity)} layers; give it to compression.calibration")


def _progress() -> Callable[[int, int], None]:
    """Says on stderr how far it is: in one line on a terminal, elsewhere whenever another tenth is done."""
    terminal, first = sys.stderr.isatty(), math.inf

    def tick(done: int, of: int) -> None:
        nonlocal first
        first = min(first, now := time.monotonic())
        # Before the first pass the model was loaded and kernels were compiled, which says nothing of the others.
        left = f", {(now - first) / (done - 1) * (of - done):.0f} s left" if done > 1 else ""
        text = f"{done} of {of} passes{left}"
        if terminal:
            typer.echo(f"\r{text:<50}", err=True, nl=done == of)
        elif done == 1 or done * 10 // of > (done - 1) * 10 // of:
            typer.echo(text, err=True)

    return tick
