"""`python -m cairn.cli.demo.asker FD < JOB`: a child that loads the model, answers, and reports over a pipe."""

import os
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

import cairn
from cairn.cli.demo import events
from cairn.cli.demo.text import build_prompts
from cairn.connect.transformers import CairnCache, CairnConnector
from cairn.errors import CairnError

Report = Callable[[events.Event], None]

FLUSH_TIMEOUT_S = 120.0


class _Clock(BaseStreamer):  # type: ignore[misc]
    """Notes when the first new token is out, and reports the answer as it grows."""

    def __init__(self, tokenizer: Any, report: Report) -> None:
        self.first_s: float | None = None
        self._tokenizer = tokenizer
        self._report = report
        self._tokens: list[int] = []
        self._prompt_seen = False
        self._started = time.perf_counter()

    def put(self, value: torch.Tensor) -> None:
        """Gets the prompt first, then each new token."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        seconds = time.perf_counter() - self._started
        if self.first_s is None:
            self.first_s = seconds
        self._tokens += value.flatten().tolist()
        self._report(events.Token(self._tokenizer.decode(self._tokens, skip_special_tokens=True), seconds))

    def end(self) -> None:
        """Nothing is held back."""


class Asker:
    """One model, asked one request at a time, with Cairn (`connector`) or without."""

    def __init__(self, job: events.Job, report: Report) -> None:
        self.job = job
        self._report = report
        # The device is the CPU on purpose: the demo is for any machine, and measures what it says.
        self.model = AutoModelForCausalLM.from_pretrained(
            job.model_dir, dtype=getattr(torch, job.dtype), local_files_only=True
        ).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(job.model_dir, local_files_only=True)
        self.prompts, self.text_tokens = build_prompts(self.tokenizer, job.text, job.questions, job.tokens)

    def warm_up(self, connector: CairnConnector | None) -> None:
        """A short unrelated request, twice, and a few tokens behind a long context, so that nobody measures the start
        of thread pools and compiled kernels, or the first touch of memory that a process which serves has had for long.
        """
        ids = list(range(100, 164))
        for _ in range(2):
            self._generate(ids, 2, connector, None)
        context, times = DynamicCache(), max(1, self.job.tokens // len(ids) - 1)
        with torch.inference_mode():
            layers = getattr(self.model(torch.tensor([ids])).past_key_values, "layers", [])
            if not all(isinstance(layer, DynamicLayer) for layer in layers):
                return  # no model for Cairn, which says so when it is opened
            for i, layer in enumerate(layers):
                context.update(layer.keys.repeat(1, 1, times, 1), layer.values.repeat(1, 1, times, 1), i)
            self.model(torch.tensor([ids[:16]]), past_key_values=context)

    def ask(self, question: int, connector: CairnConnector | None) -> events.Answer:
        """One request, from the token ids of its prompt."""
        ids = self.prompts[question]
        self._report(events.Asking(question))
        clock = _Clock(self.tokenizer, self._report)
        started = time.perf_counter()
        tokens, cache = self._generate(ids, self.job.answer_tokens, connector, clock)
        total = time.perf_counter() - started
        answer = events.Answer(
            question=question,
            ttft_s=clock.first_s or total,
            total_s=total,
            prompt_tokens=len(ids),
            token_ids=tokens,
            text=self.tokenizer.decode(tokens, skip_special_tokens=True),
        )
        if cache is not None:
            answer.dram_tokens = cache.reused_by_tier.get("dram", 0)
            answer.disk_tokens = cache.reused_by_tier.get("disk", 0)
            answer.loaded_bytes = cache.loaded_bytes
            answer.stored_bytes = cache.stored_bytes
        return answer

    def _generate(
        self, ids: Sequence[int], new_tokens: int, connector: CairnConnector | None, streamer: BaseStreamer | None
    ) -> tuple[list[int], CairnCache | None]:
        inputs = torch.tensor([ids])
        with ExitStack() as stack:
            cache = stack.enter_context(connector.cache(inputs)) if connector else None
            output = self.model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                past_key_values=cache,
                max_new_tokens=new_tokens,
                do_sample=False,
                streamer=streamer,
            )
        return output[0, len(ids) :].tolist(), cache


def answer_all(job: events.Job, report: Report) -> None:
    """Runs the job from Ready to Done."""
    asker = Asker(job, report)
    with ExitStack() as stack:
        connector = None
        if job.storage is not None:
            connector = stack.enter_context(
                CairnConnector.open(
                    asker.model,
                    dram_bytes=job.storage.dram_bytes,
                    disk_path=Path(job.storage.disk_path),
                    disk_bytes=job.storage.disk_bytes,
                )
            )
        asker.warm_up(connector)
        versions = {
            "cairn": cairn.__version__,
            "torch": f"{torch.__version__} (threads: {torch.get_num_threads()})",
            "transformers": transformers.__version__,
        }
        kv_token_bytes = connector.engine.namespace.geometry.token_bytes if connector else 0
        lengths = [len(prompt) for prompt in asker.prompts]
        report(events.Ready(lengths, asker.text_tokens, kv_token_bytes, versions))
        for question in job.ask:
            report(asker.ask(question, connector))
        started = time.perf_counter()
        if connector:
            connector.engine.flush(FLUSH_TIMEOUT_S)
    report(events.Done(time.perf_counter() - started))


def main(job_json: bytes, fd: int) -> None:
    """Runs a job and reports its end, good or bad."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with os.fdopen(fd, "wb", buffering=0) as pipe:

        def report(event: events.Event) -> None:
            pipe.write(events.encode(event))

        try:
            answer_all(msgspec.json.decode(job_json, type=events.Job), report)
        except (CairnError, OSError, ValueError, RuntimeError, MemoryError) as error:
            report(events.Failed(type(error).__name__, " ".join(str(error).split()) or repr(error)))
            raise


if __name__ == "__main__":
    main(sys.stdin.buffer.read(), int(sys.argv[1]))
