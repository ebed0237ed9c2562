"""Request logs and recordings of KV events as traces."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.fleet.wire_events import encode, stored

from cairn.errors import InputError
from cairn.fleet.base import Source
from cairn.fleet.recording import Message, Recorder
from cairn.sim.logs import open_trace
from cairn.sim.trace import Trace

SLICE = Path(__file__).parents[1] / "data" / "conversation_2000.jsonl"


def log_of(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def ids(trace: Trace, request: int) -> list[int]:
    return trace.blocks[trace.starts[request] : trace.starts[request + 1]].tolist()


def test_token_ids_and_their_answers(tmp_path: Path) -> None:
    """The second turn's prompt is the first one's, its answer, and more."""
    prompt, answer = list(range(40)), list(range(100, 124))
    path = log_of(
        tmp_path / "log",
        {"timestamp": 10.5, "prompt_token_ids": prompt, "output_token_ids": answer, "model": "m"},
        {"timestamp": "1970-01-01T00:00:20+00:00", "prompt": [*prompt, *answer, *range(9)], "output_tokens": 5},
    )
    trace = open_trace(path, block_tokens=16)
    assert trace.times.tolist() == [10.5, 20.0]
    assert trace.block_tokens == 16
    assert trace.asked.tolist() == [2, 4]
    assert ids(trace, 0) == [0, 1, 2, 3]
    assert ids(trace, 1) == [0, 1, 2, 3]
    assert trace.reused().tolist() == [0, 4]
    assert list(zip(trace.input_tokens, trace.output_tokens, strict=True)) == [(40, 24), (73, 5)]


def test_text_and_chats_by_their_bytes(tmp_path: Path) -> None:
    system = {"role": "system", "content": "x" * 600}
    usage = {"usage": {"completion_tokens": 7, "prompt_tokens": 1}}
    path = log_of(
        tmp_path / "log",
        {"timestamp": 0, "messages": [system, {"role": "user", "content": "a"}], **usage},
        {"timestamp": 1, "messages": [system, {"role": "user", "content": "b" * 99}], **usage},
        {"timestamp": 2, "prompt": "y" * 400, "output_tokens": 1},
    )
    trace = open_trace(path, block_tokens=32)
    assert trace.reused().tolist() == [0, 4, 0]
    assert trace.input_tokens.tolist() == [157, 181, 100]
    assert trace.output_tokens.tolist() == [7, 7, 1]


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"timestamp": 1, "prompt": "a"}, "line 2: no answer"),
        ({"timestamp": 1, "output_tokens": 3}, "line 2: no prompt"),
        ({"prompt": "a", "output_tokens": 3}, "timestamp"),
        ({"timestamp": "tomorrow", "prompt": "a", "output_tokens": 3}, "tomorrow"),
        ({"timestamp": 1, "prompt": [-1], "output_tokens": 3}, "-1"),
        ({"timestamp": 1, "messages": [{"content": 5}], "output_tokens": 3}, r"messages\[0\]\.content"),
        ({"request": {"prompt": "a"}, "response": {"usage": {"completion_tokens": 1}}}, "line 2: no time"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, row: dict[str, Any], says: str) -> None:
    path = log_of(tmp_path / "log", {"timestamp": 0, "prompt": "ab", "output_tokens": 1}, row)
    with pytest.raises(InputError, match=says):
        open_trace(path)


def test_requests_and_responses_of_openais_api_as_they_are(tmp_path: Path) -> None:
    """A proxy's log of bodies: the second turn finds the first one's answer; a batch's is nested once more."""
    said = [{"role": "user", "content": "q" * 200}]
    answer = {"role": "assistant", "content": "a" * 400}
    parts = [{"type": "text", "text": "q" * 200}]
    later = [{"role": "user", "content": parts}, answer, {"role": "user", "content": "more" * 50}]
    usage = {"usage": {"prompt_tokens": 60, "completion_tokens": 100}}
    path = log_of(
        tmp_path / "log",
        {
            "request": {"model": "m", "messages": said},
            "response": {"created": 10, "choices": [{"message": answer}], **usage},
        },
        {
            "custom_id": "1",
            "body": {"messages": later},
            "response": {"status_code": 200, "body": {"created": 20, **usage}},
        },
        {"created": 30, "prompt": [1] * 64, "choices": [{"index": 0, "text": "x", "token_ids": [2] * 64}]},
        {"created": 31, "prompt": [1] * 64 + [2] * 64, "choices": [{"text": "five."}]},
    )
    trace = open_trace(path, block_tokens=16)
    assert trace.times.tolist() == [10, 20, 30, 31]
    assert trace.output_tokens.tolist() == [100, 100, 64, 2]
    assert trace.reused().tolist() == [0, (len("<user><assistant>") + 600) // 64, 0, 8]


VLLM_LOG = """\
INFO 12-31 23:59:58 [__init__.py:1] a banner without requests, prompt_token_ids: [9, 9]
(APIServer pid=7) DEBUG 12-31 23:59:59 [request_logger.py:50] Request chatcmpl-a details: \
prompt: 'prompt_token_ids: [9]', prompt_token_ids: [1, 2, 3, 4], prompt_embeds shape: None.
(APIServer pid=7) INFO 12-31 23:59:59 [request_logger.py:65] Received request chatcmpl-a: params: SamplingParams(n=1, \
max_tokens=50, min_tokens=0), lora_request: None.
(APIServer pid=7) INFO:     127.0.0.1:50000 - "POST /v1/chat/completions HTTP/1.1" 200 OK
(APIServer pid=7) DEBUG 01-01 00:00:01 [request_logger.py:105] Generated response chatcmpl-a \
(streaming delta) details: output_token_ids: [5, 6]
(APIServer pid=7) DEBUG 01-01 00:00:01 [request_logger.py:105] Generated response chatcmpl-a \
(streaming delta) details: output_token_ids: [7, 8]
(APIServer pid=7) INFO 01-01 00:00:01 [request_logger.py:112] Generated response chatcmpl-a (streaming complete): \
output: 'hello', finish_reason: streaming_complete
INFO 01-01 00:00:03 [logger.py:41] Received request cmpl-b-0: prompt: 'x', params: SamplingParams(n=1, max_tokens=20), \
prompt_token_ids: [1, 2, 3, 4, 5, 6, 7, 8, 9], prompt_embeds shape: None, lora_request: None.
INFO 01-01 00:00:03 [request_logger.py:65] Received request embd-c: params: PoolingParams(), lora_request: None.
"""


def test_the_log_of_a_vllm_server(tmp_path: Path) -> None:
    """Of today's form and the one of 2025; over the end of a year, which it does not tell."""
    path = tmp_path / "vllm.log"
    path.write_text(VLLM_LOG)
    trace = open_trace(path, block_tokens=4)
    assert np.diff(trace.times).tolist() == [4.0]
    assert list(zip(trace.input_tokens, trace.output_tokens, strict=True)) == [(4, 4), (9, 20)]
    assert trace.asked.tolist() == [1, 2]
    assert [ids(trace, i) for i in range(2)] == [[0, 1], [0, 1]]
    assert len(open_trace(path, block_tokens=4, limit=1)) == 1


def test_a_log_of_vllm_without_token_ids_says_how_to_get_them(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text("\n".join(line for line in VLLM_LOG.splitlines() if "prompt_token_ids" not in line))
    with pytest.raises(InputError, match="--enable-log-requests --enable-log-outputs --log-level DEBUG"):
        open_trace(path)


def test_a_time_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "vllm.log"
    path.write_text(VLLM_LOG.replace("INFO 01-01 00:00:03 [logger", "INFO 13-32 00:00:03 [logger"))
    with pytest.raises(InputError, match=r"line 8: 13-32 00:00:03 is no time"):
        open_trace(path)


def test_mooncakes_format_is_found_out() -> None:
    assert len(open_trace(SLICE, limit=7)) == 7


def test_a_recording_of_events(tmp_path: Path) -> None:
    """A prompt in two chunks and its answer; another turn behind it; another engine with the same beginning."""
    a, b = Source("a", 0), Source("b", 0)
    tokens = list(range(16 * 8))

    def block(first: int, last: int) -> list[int]:
        return tokens[16 * first : 16 * last]

    told = [
        (100.0, a, stored([1, 2], block(0, 2), 16)),
        (100.2, a, stored([3, 4], block(2, 4), 16, parent_block_hash=2)),
        (101.0, a, stored([5], block(4, 5), 16, parent_block_hash=4)),
        (160.0, a, stored([6, 7, 8], block(5, 8), 16, parent_block_hash=5)),
        (161.0, b, stored([21, 22], block(0, 2), 16)),
        (162.0, b, stored([99], [7] * 16, 16, parent_block_hash=77)),
    ]
    with Recorder(tmp_path / "events") as recorder:
        sequence = {a: 0, b: 0}
        for at, source, event in told:
            recorder.write(Message(at, source, b"kv", sequence[source], encode([event])))
            sequence[source] += 1
    trace = open_trace(tmp_path / "events")
    assert trace.block_tokens == 16
    assert trace.times.tolist() == [100.0, 160.0, 161.0]
    assert [ids(trace, i) for i in range(3)] == [[0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1]]
    assert trace.asked.tolist() == [4, 8, 2]
    assert trace.reused().tolist() == [0, 5, 2]
    assert trace.output_tokens.tolist() == [16, 1, 1]
    assert open_trace(tmp_path / "events", limit=2).times.tolist() == [100.0, 160.0]
