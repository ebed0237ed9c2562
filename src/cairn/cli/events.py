"""`cairn events`: KV events on the wire, recorded, published again, shown."""

import contextlib
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cairn.cli.output import help_if_alone, show

if TYPE_CHECKING:
    from cairn.fleet.base import Event, Source
    from cairn.fleet.instances import Instance
    from cairn.fleet.recording import Message, Recorder

app = typer.Typer(
    callback=help_if_alone,
    invoke_without_command=True,
    rich_markup_mode=None,
    help="Record, replay and show the KV events of engines.",
)

#: More than that no system sleeps at a time, seconds.
_LONGEST_S = 1e9

_File = Annotated[Path, typer.Argument(exists=True, dir_okay=False, help="A recording.")]
_Json = Annotated[bool, typer.Option("--json", help="For machines.")]


@app.command()
def record(
    file: Annotated[Path, typer.Argument(help="Where to write the recording; must not be there yet.")],
    endpoint: Annotated[str, typer.Option(help="Where the engine publishes, as tcp://host:5557.")],
    replay: Annotated[str | None, typer.Option(help="Where its replay is; fetches what was published before.")] = None,
    bind: Annotated[bool, typer.Option("--bind", help="The engine connects, so bind.")] = False,
    name: Annotated[str, typer.Option(help="The instance's name in the recording.")] = "engine",
    seconds: Annotated[float, typer.Option(min=0, help="How long at most.")] = 3600.0,
    messages: Annotated[int, typer.Option(min=1, help="How many at most.")] = 1 << 40,
) -> None:
    """Record what an engine publishes, until interrupted or one of the bounds is reached.

    \b
    Example:
      cairn events record events.kv --endpoint tcp://127.0.0.1:5557 --replay tcp://127.0.0.1:5558 --seconds 60
    """
    import asyncio

    from cairn.fleet.instances import Instance
    from cairn.fleet.recording import Recorder

    with Recorder(file) as recorder:
        try:
            asyncio.run(_record(Instance(name, endpoint, replay, bind), recorder, seconds, messages))
        finally:
            typer.echo(f"{recorder.messages} messages in {file}")


@app.command()
def replay(
    file: _File,
    endpoint: Annotated[str, typer.Option(help="Where to publish, as tcp://*:5557.")],
    replay: Annotated[str | None, typer.Option(help="Where to answer replays.")] = None,
    connect: Annotated[bool, typer.Option("--connect", help="Connect instead of bind.")] = False,
    source: Annotated[str | None, typer.Option(help="Which source, as engine/0, if there are several.")] = None,
    speed: Annotated[float, typer.Option(min=0, help="Times the recording's own speed; 0: as fast as possible.")] = 1.0,
    stay: Annotated[float, typer.Option(min=0, max=_LONGEST_S, help="Seconds to stay for replays afterwards.")] = 1.0,
) -> None:
    """Publish a recording again, under sequences of its own from 0 on.

    \b
    Example:
      cairn events replay events.kv --endpoint 'tcp://*:5557' --replay 'tcp://*:5558' --speed 10
    """
    from cairn.errors import InputError
    from cairn.fleet.publisher import Publisher
    from cairn.fleet.recording import Recording

    sources = {f"{message.source.instance}/{message.source.rank}" for message in Recording(file)}
    if source is None and len(sources) > 1:
        raise InputError(f"{file}: holds {', '.join(sorted(sources))}; name one with --source")
    if source is not None and source not in sources:
        raise InputError(f"{source}: not in {file}, which holds {', '.join(sorted(sources)) or 'nothing'}")
    with Publisher(endpoint, replay, bind=not connect) as publisher:
        sent = 0
        for message in _paced(Recording(file), speed):
            if source in (None, f"{message.source.instance}/{message.source.rank}"):
                publisher.publish(message.payload)
                sent += 1
        typer.echo(f"{sent} messages published")
        time.sleep(stay)


@app.command("show")
def show_recording(file: _File, as_json: _Json = False) -> None:
    """Show what a recording holds.

    \b
    Example:
      cairn events show events.kv
    """
    from cairn.fleet.recording import Recording, summarize

    show(summarize(Recording(file)), title=f"cairn events show {file}", as_json=as_json)


class Nowhere:
    """A sink for what is only recorded, or listened to."""

    def apply(self, source: "Source", events: "Sequence[Event]") -> None: ...

    def drop(self, source: "Source") -> None: ...


async def _record(instance: "Instance", recorder: "Recorder", seconds: float, messages: int) -> None:
    import asyncio

    from cairn.fleet.subscriber import Subscriber

    full = asyncio.Event()

    def tap(message: "Message") -> None:
        if recorder.messages < messages:
            recorder.write(message)
        if recorder.messages >= messages:
            full.set()

    async with Subscriber(Nowhere(), [instance], tap=tap):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(full.wait(), seconds)


def _paced(messages: "Iterable[Message]", speed: float) -> "Iterator[Message]":
    """Each message when it is due."""
    begun, first = time.monotonic(), None
    for message in messages:
        first = message.time if first is None else first
        if speed:
            pause_s = begun + (message.time - first) / speed - time.monotonic()
            time.sleep(min(max(0.0, pause_s), _LONGEST_S))
        yield message
