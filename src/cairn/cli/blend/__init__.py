"""`cairn blend`: whether a model can be blended, and what it costs."""

from pathlib import Path
from typing import Annotated

import typer

from cairn.cli.config import Settings, load
from cairn.cli.output import help_if_alone, machine, show

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Blending: chunks reused wherever they stand in a prompt.",
)


@app.command()
def check(
    model: Annotated[Path, typer.Argument(exists=True, file_okay=False, help="A model in Hugging Face format.")],
    prompts: Annotated[int, typer.Option(min=2, help="RAG prompts of real texts, chunks in permuted order.")] = 24,
    most_kl: Annotated[float, typer.Option(min=0, help="Nats a token of the answer that it may cost.")] = 0.1,
    file: Annotated[Path | None, typer.Option(help="YAML file, whose section `blending` is checked.")] = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Hold a model's blended answers to fully computed ones, on the CPU; exit code 1 if they differ too much.

    The upper end of KL's interval of 95 % must be at most --most-kl. Run it before blending.enabled is set.

    \b
    Example:
      cairn blend check ./SmolLM2-135M-Instruct --set blending.recompute_ratios=[0.3]
    """
    from cairn.cli.blend.run import run_check
    from cairn.errors import CairnError

    blending = load(file, settings).blending
    result = run_check(model, blending, prompts, lambda i, of: typer.echo(f"prompt {i} of {of}", err=True))
    show({**result, "machine": machine()} if as_json else result, title=f"cairn blend check {model}", as_json=as_json)
    kl = result["blended"]["kl_95"][1]
    if kl > most_kl:
        raise CairnError(
            f"{model}: blending costs up to {kl:.3g} nats a token, more than --most-kl {most_kl:g}; leave "
            "blending.enabled false, or raise recompute_ratios"
        )
