"""`cairn metrics`: what can be seen of Cairn, as a page and as a dashboard, made from what the processes export."""

import typer

from cairn.cli.output import help_if_alone

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Document and draw the metrics.",
)


@app.command()
def docs() -> None:
    """Print the reference of all metrics in Markdown.

    \b
    Example:
      cairn metrics docs > docs/metrics.md
    """
    from cairn.cli.metrics_docs import render

    typer.echo(render(), nl=False)


@app.command()
def dashboard() -> None:
    """Print the dashboard for Grafana, to be imported there.

    \b
    Example:
      cairn metrics dashboard > cairn.json
    """
    from cairn.cli.metrics_dashboard import render

    typer.echo(render(), nl=False)
