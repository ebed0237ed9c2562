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
    most_kl: Annotated[float, typer.Option(min=0, help="Nats a token of the answer that it may cost.")] = 0.15,
    file: Annotated[Path | None, typer.Option(help="YAML file, whose section `blending` is checked.")] = None,
    settings: Settings = [],  # noqa: B006 (typer copies it)
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Hold a model's blended answers to fully computed ones, on the CPU; exit code 1 if they differ too much.

    The upper end of KL's interval of 95 % must be at most --most-kl. What was found is kept in the model's directory:
    with the same settings blending goes by the first check layer that was close enough, or is refused if none was.

    \b
    Example:
      cairn blend check ./SmolLM2-135M-Instruct --set blending.recompute_ratios=[0.3]
    """
    from cairn.cli.blend.run import run_check
    from cairn.errors import CairnError, StorageError

    blending = load(file, settings).blending
    checked, figures = run_check(
        model, blending, prompts, most_kl, lambda i, of: typer.echo(f"prompt {i} of {of}", err=True)
    )
    result = {**figures, "check_layers": checked.check_layers}
    show({**result, "machine": machine()} if as_json else result, title=f"cairn blend check {model}", as_json=as_json)
    try:
        path = checked.save(model)
    except OSError as error:
        raise StorageError(f"{model}: {error.strerror}; what was found is kept beside the model") from error
    if checked.check_layers is None:
        raise CairnError(
            f"{model}: blending costs up to {min(kl for _, kl in checked.kl):.3g} nats a token, more than --most-kl "
            f"{most_kl:g}; leave blending.enabled false, or raise recompute_ratios ({path} says so, too)"
        )
    typer.echo(f"{path}: blending checks at {list(checked.check_layers)}", err=True)
