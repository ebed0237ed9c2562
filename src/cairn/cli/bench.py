"""`cairn bench`: measures this machine. Each bench is a function of its own, imported when it runs."""

from pathlib import Path
from typing import Annotated, Any

import typer

from cairn.cli.output import check_writable, help_if_alone, machine, show

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Measure this machine; medians, never best cases.",
)

AsJson = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command()
def engine(as_json: AsJson = False) -> None:
    """Store, retrieve and look up in DRAM, beside bare memcpy.

    \b
    Example:
      cairn bench engine --json
    """
    from cairn.cli.bench_engine import run_engine

    _report("engine", run_engine(), as_json)


@app.command()
def observe(as_json: AsJson = False) -> None:
    """What counters and spans cost the engine's paths, with and without in turns.

    
    Example:
      cairn bench observe --json
    """
    from cairn.cli.bench_observe import run_observe

    _report("observe", run_observe(), as_json)


@app.command()
def disk(
    directory: Annotated[
        Path | None,
        typer.Option("--dir", exists=True, file_okay=False, help="On the disk to measure; temporary files by default."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Read and write a disk tier, beside bare O_DIRECT I/O.

    \b
    Example:
      cairn bench disk --dir /var/cache --json
    """
    from cairn.cli.bench_disk import run_disk

    _report("disk", run_disk(directory), as_json)


@app.command()
def index(as_json: AsJson = False) -> None:
    """Allocate and evict in a full prefix index.

    \b
    Example:
      cairn bench index --json
    """
    from cairn.cli.bench_index import run_index

    _report("index", run_index(), as_json)


@app.command()
def fleet(as_json: AsJson = False) -> None:
    """Feed and ask the fleet's index.

    \b
    Example:
      cairn bench fleet --json
    """
    from cairn.cli.bench_fleet import run_fleet

    _report("fleet", run_fleet(), as_json)


@app.command()
def remote(
    urls: Annotated[list[str], typer.Argument(metavar="URL...", help="Stores, as storage.remote.url names them.")],
    as_json: AsJson = False,
) -> None:
    """Load, store and look up in remote stores, beside their bare clients.

    \b
    Example:
      cairn bench remote valkey://127.0.0.1:6379 file:///mnt/kv --json
    """
    from cairn.cli.bench_remote import run_remote

    _report("remote", run_remote(urls), as_json)


@app.command()
def node(as_json: AsJson = False) -> None:
    """Call a node over ipc, copy from its arena, and see what it uses.

    \b
    Example:
      cairn bench node --json
    """
    from cairn.cli.bench_node import run_node

    _report("node", run_node(), as_json)


@app.command()
def policy(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Requests, a JSON object a line.")],
    as_json: AsJson = False,
) -> None:
    """Replay a trace: hit rate of every policy, beside Belady.

    \b
    Example:
      cairn bench policy conversation_trace.jsonl --json
    """
    from cairn.cli.bench_policy import run_policy

    _report("policy", run_policy(trace), as_json)


@app.command()
def fleet_sim(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Requests, a JSON object a line.")],
    rate: Annotated[
        list[float] | None, typer.Option(min=0.001, max=1e6, help="Requests a second; may be repeated.")
    ] = None,
    instances: Annotated[int, typer.Option(min=1, help="Of the fleet.")] = 64,
    as_json: AsJson = False,
) -> None:
    """Schedule a trace over a simulated fleet: goodput under the SLO of every policy.

    \b
    Example:
      cairn bench fleet-sim conversation_trace.jsonl --json
    """
    from cairn.cli.bench_fleet_sim import RATES, run_fleet_sim
    from cairn.sim.fleet import FleetSettings

    settings = FleetSettings(instances=instances)
    result = run_fleet_sim(trace, rate or RATES, settings, lambda line: typer.echo(line, err=True))
    _report("fleet-sim", result, as_json)


@app.command(name="machine")
def machine_(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="In Hugging Face format; SmolLM2-135M-Instruct by default."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=2, help="Of twelve visits.")] = 4,
    as_json: AsJson = False,
) -> None:
    """Measure Transformers with Cairn on this CPU: what `cairn plan --machine` simulates.

    \b
    Example:
      cairn bench machine --json > machine.json
    """
    from cairn.cli.bench_machine import run_machine

    _report("machine", run_machine(model, rounds), as_json)


@app.command()
def quality(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="In Hugging Face format; SmolLM2-135M-Instruct by default."),
    ] = None,
    windows: Annotated[int, typer.Option(min=2, help="Windows of 256 scored tokens after 1,280 of context.")] = 80,
    calibration: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, help="Of `cairn codec calibrate`.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Processes that share the windows, of about 2 GB each.")] = 1,
    only: Annotated[str, typer.Option(help="Compare those whose names contain this: cachegen, rows, int4.")] = "",
    plot: Annotated[Path | None, typer.Option(help="Draw KL over bits into this file, PNG or SVG.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compress a real model's KV: KL, perplexity and real bits of every codec, beside CacheGen as published.

    \b
    Example:
      cairn bench quality --windows 8 --plot quality.svg --json
    """
    from cairn.cli.quality.plot import draw
    from cairn.cli.quality.run import run_quality

    if plot:
        check_writable(plot, "--plot")
    result = run_quality(
        model,
        count=windows,
        calibration=calibration,
        jobs=jobs,
        only=only,
        tick=lambda i, of: typer.echo(f"window {i} of {of}", err=True),
    )
    _report("quality", result, as_json)
    if plot:
        draw(result["quality"], plot)


@app.command()
def blend(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="In Hugging Face format; SmolLM2-135M-Instruct by default."),
    ] = None,
    prompts: Annotated[int, typer.Option(min=0, help="RAG prompts of 4 to 8 chunks in permuted order.")] = 200,
    tokens: Annotated[int, typer.Option(min=100, max=8000, help="Of each of those, about.")] = 1000,
    long: Annotated[int, typer.Option(min=0, help="Prompts of 4k tokens, for times.")] = 5,
    out: Annotated[
        Path | None, typer.Option(dir_okay=False, help="Written after every prompt; a run that was stopped goes on.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Blend RAG prompts of real texts: KL, answers and time to first token by recompute ratio, beside full prefill.

    \b
    Example:
      cairn bench blend --out blend.json --json
    """
    from cairn.cli.blend.run import run_blend

    result = run_blend(model, prompts, tokens, long, out, lambda i, of: typer.echo(f"prompt {i} of {of}", err=True))
    _report("blend", result, as_json)


@app.command()
def autopilot(
    model: Annotated[
        Path | None,
        typer.Option(exists=True, file_okay=False, help="In Hugging Face format; SmolLM2-135M-Instruct by default."),
    ] = None,
    requests: Annotated[int, typer.Option(min=4, help="Of four classes, each asked of every contender.")] = 120,
    out: Annotated[Path | None, typer.Option(dir_okay=False, help="Write what is found as it goes, too.")] = None,
    as_json: AsJson = False,
) -> None:
    """Answer a mixed workload under the autopilot, every preset and no cache: time to first token by class.

    \b
    Example:
      cairn bench autopilot --requests 40 --json
    """
    from cairn.cli.autopilot.run import run_autopilot

    result = run_autopilot(model, requests, out, lambda i, of: typer.echo(f"request {i} of {of}", err=True))
    _report("autopilot", result, as_json)


@app.command()
def serve(
    requests: Annotated[int, typer.Option(min=400, help="At each level.")] = 4000,
    engines: Annotated[int, typer.Option(min=1, max=16, help="Mock engines.")] = 4,
    concurrency: Annotated[int, typer.Option(min=1, max=256, help="Requests at a time.")] = 16,
    prompt_bytes: Annotated[int, typer.Option(min=16, max=1 << 20, help="Of each prompt.")] = 4096,
    as_json: AsJson = False,
) -> None:
    """What `cairn serve` adds to a request, and how many it carries, in front of mock engines.

    \b
    Example:
      cairn bench serve --json
    """
    from cairn.cli.bench_serve import Load, run_serve

    load = Load(engines=engines, concurrency=concurrency, requests=requests, prompt_bytes=prompt_bytes)
    _report("serve", run_serve(load), as_json)


def _report(name: str, result: dict[str, Any], as_json: bool) -> None:
    where = machine()
    if as_json:
        show({**result, "machine": where}, title=name, as_json=True)
    else:
        show(result, title=f"cairn bench {name}", as_json=False)
        typer.echo(f"on {where['cpu']}, {where['cores']} cores, kernel {where['kernel']}, {where['date']}")
