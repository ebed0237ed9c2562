"""`cairn plan`: what to buy for a service level, by simulation of a trace over fleets of different sizes."""

from pathlib import Path
from typing import Annotated

import typer

_Sizes = list[str] | None


def plan(
    trace: Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="Mooncake trace, request log, KV events.")],
    machine: Annotated[str, typer.Option(help="A preset, or a JSON file (`cairn bench machine`).")] = "h200-llama-8b",
    rate: Annotated[
        float | None, typer.Option(min=0.001, max=1e6, help="Requests a second; the trace's own if left out.")
    ] = None,
    instances: Annotated[list[int] | None, typer.Option(min=1, help="Engines; repeatable.")] = None,
    per_host: Annotated[int, typer.Option(min=1, help="Instances that share a host's DRAM and disk.")] = 8,
    dram: Annotated[_Sizes, typer.Option(metavar="SIZE", help="Of a host (512GB); repeatable.")] = None,
    disk: Annotated[_Sizes, typer.Option(metavar="SIZE", help="Of a host; repeatable.")] = None,
    remote: Annotated[_Sizes, typer.Option(metavar="SIZE", help="Shared by all; repeatable.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="Eviction; repeatable.")] = None,
    codec: Annotated[list[str] | None, typer.Option(help="Of the remote tier; repeatable.")] = None,
    scheduler: Annotated[list[str] | None, typer.Option(help="Of the service; repeatable.")] = None,
    every: Annotated[bool, typer.Option("--every", help="Every combination of sizes, not one tier at a time.")] = False,
    ttft: Annotated[float, typer.Option(min=0.001, help="SLO: seconds to the first token.")] = 2.0,
    tpot: Annotated[float, typer.Option(min=0.001, help="SLO: seconds between tokens.")] = 0.1,
    percent: Annotated[float, typer.Option(min=0, max=100, help="Of the requests that are to be within it.")] = 95.0,
    price: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=PRICE", help="gpu=2.5 (an hour), dram=3 disk=0.1 remote=0.02 (a GB and month)."),
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Repeat the trace up to so many, or cut it.")] = None,
    block_tokens: Annotated[int, typer.Option(min=1, help="Of a log's blocks.")] = 512,
    processes: Annotated[int, typer.Option(min=1, help="To simulate in.")] = 2,
    plot: Annotated[Path | None, typer.Option(metavar="FILE", help="Draw hits and TTFT over GB, SVG or PNG.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """Simulate a trace over fleets: hits, TTFT, TPOT and goodput against the size of each tier; what meets the SLO.

    The planner, the index, the eviction policies and the schedulers are those of the real stack. Without sizes each
    tier is tried by itself in five sizes up to all that the trace asks for.

    \b
    Example:
      cairn plan conversation_trace.jsonl --instances 4 --plot plan.svg --price gpu=2.5 --price dram=3
    """
    from cairn.cli.plan.run import Asked, run_plan

    chosen = {
        "instances": instances,
        "dram_bytes": dram,
        "disk_bytes": disk,
        "remote_bytes": remote,
        "policy": policy,
        "codec": codec,
        "scheduler": scheduler,
    }
    run_plan(
        Asked(
            trace=trace,
            machine=machine,
            rate=rate,
            chosen=chosen,
            per_host=per_host,
            every=every,
            slo=(ttft, tpot, percent),
            prices=price or [],
            requests=requests,
            block_tokens=block_tokens,
            processes=processes,
            plot=plot,
            as_json=as_json,
        )
    )
