"""The demo itself: the same questions to the same model, in separate processes, without Cairn and with."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

import msgspec

from cairn.cli.demo import events, model, plot
from cairn.cli.demo.child import Child
from cairn.cli.demo.report import Question, Report, describe_machine
from cairn.cli.demo.show import Screen, show_report
from cairn.cli.demo.text import Text, load_text
from cairn.cli.output import check_writable
from cairn.errors import CairnError, InputError, StorageError

#: A child that says nothing for this long is given up: more than the longest prefill of a slow machine.
SILENCE_S = 300.0
#: KV bytes a token that room is made for: SmolLM2-135M in float32.
TOKEN_BYTES = 46_080


class Options(NamedTuple):
    """The command's flags; see `cairn demo --help`."""

    tokens: int
    text: Path | None
    questions: tuple[str, ...]
    dtype: str
    answer_tokens: int
    output: Path
    json: bool
    keep: bool
    cache_dir: Path
    model: Path | None


class Outcome(NamedTuple):
    """What one child did."""

    ready: events.Ready
    answers: list[events.Answer]
    flush_s: float


def run(options: Options) -> Report:
    """Runs the demo and shows it; returns what was found. Raises CairnError for anything that keeps it from its end."""
    screen = Screen(quiet=options.json)
    text = load_text(options.text)
    if options.model is None:
        _check_context(options, model.CONTEXT)
    check_writable(options.output, "--output")
    home = options.model or model.fetch_model(options.cache_dir, screen)
    _check_context(options, model.context_of(home))
    with _storage(options) as storage:
        report = _ask_all(options, text, home, storage, screen)
        if options.keep:
            screen.line(f"cache directory kept: {storage.disk_path}")
    plot.draw(report, options.output)
    show_report(screen, report, options.output)
    if options.json:
        print(report.to_json())
    _judge(report)
    return report


def _judge(report: Report) -> None:
    """Raises CairnError for a run that does not show what the demo is there to show."""
    if report.dtype == "float32" and not report.summary().identical:
        raise CairnError("an answer with Cairn differs from the one without; please report this with the --json output")
    for number, question in enumerate(report.questions, 1):
        if not question.dram.dram_tokens or not question.disk.disk_tokens:
            raise CairnError(f"Q{number} found nothing in DRAM or on disk; please report this with the --json output")


def _ask_all(options: Options, text: Text, home: Path, storage: events.Storage, screen: Screen) -> Report:
    questions = list(options.questions or text.questions)
    everything = range(len(questions))
    screen.heading(f"The text: {text.title}")
    screen.line(f"licence: {text.license}; the prompts hold its first part")

    def job(ask: list[int], where: events.Storage | None) -> events.Job:
        return events.Job(
            str(home), text.content, questions, ask, options.tokens, options.answer_tokens, options.dtype, where
        )

    for number, wording in enumerate(questions):
        screen.question(number, wording)
    screen.heading("Process 1: plain Transformers, without Cairn (TTFT: time to the first token)")
    plain = _ask(job(list(everything), None), screen, None)
    screen.heading("Process 2: Cairn, at first with an empty cache, then with the text in DRAM")
    warm = _ask(job([*everything, 0], storage), screen, plain.answers)
    disk = []
    for question in everything:
        screen.heading(f"Process {3 + question}: Cairn after a restart, from disk")
        disk.append(_ask(job([question], storage), screen, plain.answers).answers[0])
    cold, *dram = warm.answers
    dram = [dram[-1], *dram[:-1]]
    return Report(
        machine=describe_machine(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        model=model.NAME if options.model is None else home.name,
        dtype=options.dtype,
        text=text.title,
        license=text.license,
        prompt_tokens=max(plain.ready.prompt_tokens),
        kv_token_bytes=warm.ready.kv_token_bytes,
        versions=plain.ready.versions,
        questions=[
            Question(questions[i], plain.answers[i], dram[i], disk[i], cold if i == 0 else None) for i in everything
        ],
        flush_s=warm.flush_s,
    )


def _ask(job: events.Job, screen: Screen, plain: list[events.Answer] | None) -> Outcome:
    """Runs one child to its end and shows its requests, beside those without Cairn unless these are they."""
    ready: events.Ready | None = None
    answers: list[events.Answer] = []
    flush_s = 0.0
    with (
        screen.request() as live,
        Child(
            "cairn.cli.demo.asker", what="the process that asks", feed=msgspec.json.encode(job), reports=True
        ) as child,
    ):
        live.show("starting Python and loading the model")
        for event in child.events(SILENCE_S, live.tick):
            match event:
                case events.Ready():
                    ready = event
                    if event.text_tokens and max(event.prompt_tokens) < 0.9 * job.tokens:
                        screen.line(
                            f"the text is short: prompts of {max(event.prompt_tokens):,} tokens", style="yellow"
                        )
                case events.Asking():
                    live.show(f"Q{event.question + 1} {job.questions[event.question]}", restart=True)
                case events.Token():
                    live.show(event.text)
                case events.Answer():
                    answers.append(event)
                    screen.answer(event, plain[event.question] if plain else None)
                    live.show("ending the process")
                case events.Done():
                    flush_s = event.flush_s
    if ready is None or len(answers) != len(job.ask):
        raise CairnError(f"the process that asks gave {len(answers)} of {len(job.ask)} answers")
    return Outcome(ready, answers, flush_s)


def _check_context(options: Options, context: int) -> None:
    most = context - options.answer_tokens
    if options.tokens > most:
        raise InputError(
            f"--tokens {options.tokens}: the model's context is {context}, of which the answer takes "
            f"{options.answer_tokens}; use at most {most}"
        )


@contextmanager
def _storage(options: Options) -> Iterator[events.Storage]:
    """A fresh cache directory with room for what this demo stores; removed afterwards unless it is to be kept."""
    questions = max(3, len(options.questions))
    tokens = options.tokens + questions * (options.answer_tokens + 256) + 1024
    size = -(-tokens * TOKEN_BYTES * 5 // 4 >> 20) << 20
    model.make_room(options.cache_dir, size + (64 << 20), "the demo's KV cache")
    try:
        options.cache_dir.mkdir(parents=True, exist_ok=True)
        directory = Path(tempfile.mkdtemp(prefix="demo-", dir=options.cache_dir))
    except OSError as error:
        raise StorageError(f"{options.cache_dir}: {error.strerror}; choose another with --cache-dir") from error
    try:
        yield events.Storage(str(directory), size, size)
    finally:
        if not options.keep:
            shutil.rmtree(directory, ignore_errors=True)
