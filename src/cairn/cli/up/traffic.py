"""Clients for a cluster on this machine, so that there is something to see: `python -m cairn.cli.up.traffic URL`.

A few assistants with long instructions, each with several users who ask about the same document in conversations, some
liked more than others; and a few prompts that nobody has seen.
"""

import argparse
import asyncio
import random
from typing import Any, Final

import msgspec

from cairn.cli.demo.text import load_text
from cairn.errors import CairnError
from cairn.serve.gateway.asked import CHAT
from cairn.serve.gateway.http1 import Pool
from cairn.serve.process import loop_factory

_ASSISTANTS: Final = (
    "You are a paralegal. Quote the section that you rely on, and say so where the text is silent.",
    "You are a support agent. Be brief and friendly, and never promise what the document does not.",
    "You are a technical writer. Explain every term at its first use, in words of one syllable where you can.",
    "You are an auditor. List obligations as bullet points, with who owes what to whom.",
    "You are a teacher. Answer with a question first, then with an example from everyday life.",
)
_QUESTIONS: Final = (
    "What does this text oblige me to do?",
    "Who may change it, and how?",
    "Which exception matters the most?",
    "What happens if I do not comply?",
    "Summarize it in one sentence.",
)
_TURNS: Final = 5
#: Characters of a document.
_SHORT, _LONG = 3_000, 14_000
_STRANGERS: Final = 0.15
_PATIENCE_S: Final = 60.0
_AT_ONCE: Final = 32


class Crowd:
    """Conversations with one service. rate: requests a second, in the mean."""

    def __init__(self, url: str, model: str, rate: float, seed: int) -> None:
        self._pool, self._model, self._rate = Pool(url, _PATIENCE_S, None), model, rate
        self._random = random.Random(seed)
        text = load_text(None).content
        sizes = [self._random.randint(_SHORT, _LONG) for _ in _ASSISTANTS]
        self._text = text
        self._documents = [self._excerpt(size) for size in sizes]
        self._open: list[list[dict[str, str]]] = []

    async def run(self) -> None:
        """Until it is cancelled."""
        room = asyncio.Semaphore(_AT_ONCE)
        async with asyncio.TaskGroup() as tasks:
            while True:
                await asyncio.sleep(self._random.expovariate(self._rate))
                await room.acquire()
                tasks.create_task(self._turn(self._messages())).add_done_callback(lambda _: room.release())

    def _messages(self) -> list[dict[str, str]]:
        """A conversation with its next question: one that goes on, or a new one."""
        if self._open and self._random.random() < 0.6:
            messages = self._open.pop(self._random.randrange(len(self._open)))
        else:
            which = min(int(self._random.expovariate(0.7)), len(_ASSISTANTS) - 1)
            document = self._documents[which]
            if self._random.random() < _STRANGERS:
                document = self._excerpt(_SHORT)
            messages = [{"role": "system", "content": f"{_ASSISTANTS[which]}\n\n{document}"}]
        return [*messages, {"role": "user", "content": self._random.choice(_QUESTIONS)}]

    def _excerpt(self, size: int) -> str:
        """From the beginning of a paragraph on."""
        at = self._text.find("\n\n", self._random.randrange(max(1, len(self._text) - 2 * size)))
        return self._text[at : at + size].strip()

    async def _turn(self, messages: list[dict[str, str]]) -> None:
        body: dict[str, Any] = {"model": self._model, "messages": messages, "stream": True, "temperature": 0}
        body["max_tokens"] = self._random.randint(8, 48)
        headers = [(b"content-type", b"application/json")]
        try:
            answer = await self._pool.post(CHAT.encode(), headers, msgspec.json.encode(body), _PATIENCE_S)
            try:
                said = bytearray()
                while data := await answer.read(_PATIENCE_S):
                    said += data
            finally:
                answer.close()
        except CairnError:
            return  # the service counts what fails
        if answer.status == 200 and len(messages) < 2 * _TURNS:
            self._open.append([*messages, {"role": "assistant", "content": _text_of(bytes(said))}])


def _text_of(stream: bytes) -> str:
    events = [line[6:] for line in stream.split(b"\n") if line.startswith(b'data: {"')]
    choices = [choice for event in events for choice in msgspec.json.decode(event).get("choices", ())]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


def main() -> None:
    """From the command line, until a signal."""
    parser = argparse.ArgumentParser(description="Clients for a cluster on this machine.")
    parser.add_argument("url")
    parser.add_argument("--model", required=True)
    parser.add_argument("--rate", type=float, default=2.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        runner.run(Crowd(given.url, given.model, given.rate, given.seed).run())


if __name__ == "__main__":
    main()
