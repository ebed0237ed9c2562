"""`cairn codec`: what compression needs to know about a model."""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli.output import help_if_alone

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
    plane and window.

    \b
    Example:
      cairn codec calibrate ./SmolLM2-135M-Instruct book.txt --out smollm2.json
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from cairn.cli.quality.calibrate import calibrate as run

    made = run(
        AutoModelForCausalLM.from_pretrained(model, dtype="float32", local_files_only=True).eval(),
        AutoTokenizer.from_pretrained(model, local_files_only=True),
        text.read_text(encoding="utf-8", errors="replace"),
        name=model.resolve().name,
        windows=windows,
        tick=lambda done, of: typer.echo(f"window {done} of {of}", err=True),
    )
    made.save(out)
    typer.echo(f"{out}: {len(made.sensitivity)} layers; give it to compression.calibration")
