"""An engine in a process of its own, which answers prompts while others do."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.vllm.engine import answers, serving, settle, stats


class Neighbour:
    """A context manager; the engine is there once `wait` has returned."""

    def __init__(self, model: Path, settings: dict[str, Any], options: dict[str, Any]) -> None:
        command = [sys.executable, "-m", "tests.vllm.neighbour", json.dumps([str(model), settings, options])]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def wait(self) -> Any:
        """What it says next: after its start, and after each `ask`."""
        assert self.process.stdout
        line = self.process.stdout.readline()
        assert line, "the other engine has ended"
        return json.loads(line)

    def ask(self, prompts: list[list[int]]) -> None:
        """Has it answer; what it then says are its answers, its tokens hit and stored so far, and batches of events."""
        assert self.process.stdin
        self.process.stdin.write(json.dumps(prompts) + "\n")
        self.process.stdin.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error:
            self.process.kill()
        self.process.communicate(timeout=60)


def published(llm: Any) -> int:
    """Batches of events on the wire, once the publisher's thread has nothing left to do; 0 without a publisher."""
    publisher = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
    if not hasattr(publisher, "_event_queue"):
        return 0
    publisher._event_queue.join()
    return len(publisher._buffer)


def main() -> None:
    told, _ = os.fdopen(os.dup(1), "w"), os.dup2(2, 1)  # what vLLM prints is no answer
    model, settings, options = json.loads(sys.argv[1])
    with serving(Path(model), settings, **options) as llm:
        said: Any = "ready"
        while True:
            print(json.dumps(said), file=told, flush=True)
            line = sys.stdin.readline()
            if not line:
                return
            found = answers(llm, json.loads(line))
            settle(llm)
            tokens = stats(llm)
            counts = [int(sum(tokens.get(name, {}).values())) for name in ("hit_tokens", "stored_tokens")]
            said = [found, *counts, published(llm)]


if __name__ == "__main__":
    main()
