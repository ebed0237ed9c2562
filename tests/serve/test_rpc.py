"""gRPC as llm-d's schedulers speak it, with the stubs and with bytes made by hand."""

import asyncio
import subprocess
import sys
from pathlib import Path

import grpc
import pytest

import cairn.serve.proto
from cairn.config.schema import Index
from cairn.serve.indexer.parts import Parts
from cairn.serve.indexer.rpc import make_server
from cairn.serve.proto.indexer_pb2 import GetPodScoresRequest
from cairn.serve.proto.indexer_pb2_grpc import IndexerServiceStub
from tests.fleet.wire_events import encode, stored
from tests.serve.conftest import Fleet
from tests.serve.running import until

METHOD = "/indexer.v1.IndexerService/GetPodScores"
PROTO = Path(cairn.serve.proto.__file__).parent


@pytest.fixture
def known(fleet: Fleet) -> str:
    """A prompt of 12 tokens: `a` holds 8 of them, rank 0 of `b` 4."""
    text = "grpc: prompt"
    from tests.demo.tiny import tiny_tokenizer

    tokens = tiny_tokenizer()(text)["input_ids"]
    fleet.a.publish(encode([stored([77_001, 77_002], tokens[:8], 4)]))
    fleet.b[0].publish(encode([stored([77_003], tokens[:4], 4)], rank=0))
    fleet.b[1].publish(encode([stored([77_004], [5_000_000] * 4, 4)], rank=1))
    until(lambda: fleet.service.score(prompt=text)["scores"]["a"]["score"] == 8, "a")
    until(lambda: fleet.service.score(prompt=text)["scores"]["b"]["score"] == 4, "b")
    until(lambda: "ranks" in fleet.service.score(prompt=text)["scores"]["b"], "rank 1 of b")
    return text


def test_scores_of_pods(fleet: Fleet, known: str) -> None:
    with grpc.insecure_channel(fleet.service.rpc) as channel:
        ask = IndexerServiceStub(channel).GetPodScores
        found = ask(GetPodScoresRequest(prompt=known, model_name="tiny"), timeout=30).scores
        assert [(one.pod, one.score) for one in found] == [("a", 8.0), ("b", 4.0)]
        assert [one.HasField("data_parallel_rank") for one in found] == [False, True]
        assert found[1].data_parallel_rank == 0
        request = GetPodScoresRequest(prompt=known, model_name="tiny", pod_identifiers=["b", "o", "unheard-of"])
        assert [one.pod for one in ask(request, timeout=30).scores] == ["b"]


def test_the_wire(fleet: Fleet, known: str) -> None:
    """Field 1 the prompt, 2 the model, 3 a pod, all text; back: field 1 {1: pod, 2: double}."""
    request = b"".join(
        bytes([field << 3 | 2, len(text)]) + text.encode() for field, text in ((1, known), (2, "tiny"), (3, "a"))
    )
    with grpc.insecure_channel(fleet.service.rpc) as channel:
        answer = channel.unary_unary(METHOD)(request, timeout=30)
    assert answer == b"\x0a\x0c\x0a\x01a\x11" + bytes.fromhex("0000000000002040")


@pytest.mark.parametrize(("keys", "pass_"), [(["one", "two"], {"one", "two"}), ([], {"", "one", "two", "onetwo"})])
def test_each_key_opens(keys: list[str], pass_: set[str]) -> None:
    async def main() -> set[str]:
        parts, passed = Parts(Index()), set()
        server, port = make_server(parts, keys, "127.0.0.1:0")
        await server.start()
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            for key in ("", "one", "two", "onetwo"):
                ask = channel.unary_unary(METHOD)(b"", timeout=30, metadata=[("authorization", f"Bearer {key}")])
                if await ask.code() is grpc.StatusCode.NOT_FOUND:  # there is no tokenizer
                    passed.add(key)
        await server.stop(0)
        parts.close()
        return passed

    assert asyncio.run(main()) == pass_


def test_what_is_refused(fleet: Fleet) -> None:
    with grpc.insecure_channel(fleet.service.rpc) as channel:
        ask = IndexerServiceStub(channel).GetPodScores
        for request, code, words in (
            (GetPodScoresRequest(prompt="x", model_name="unheard-of"), grpc.StatusCode.NOT_FOUND, "has no tokenizer"),
            (GetPodScoresRequest(prompt="x" * 100_001, model_name="tiny"), grpc.StatusCode.RESOURCE_EXHAUSTED, "bytes"),
            (GetPodScoresRequest(prompt="x" * 3_000_000), grpc.StatusCode.RESOURCE_EXHAUSTED, "larger than max"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                ask(request, timeout=30)
            assert caught.value.code() == code
            assert words in caught.value.details()
        with pytest.raises(grpc.RpcError) as caught:
            channel.unary_unary(METHOD)(b"\xff\xff", timeout=30)
        assert caught.value.code() in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    assert 'request="GetPodScores",status="NOT_FOUND"' in fleet.service.client.get("/metrics").text


def test_the_stubs_are_what_the_protocol_makes(tmp_path: Path) -> None:
    """`make proto` renews them."""
    target = tmp_path / "cairn" / "serve" / "proto"
    target.mkdir(parents=True)
    (target / "indexer.proto").write_bytes((PROTO / "indexer.proto").read_bytes())
    outputs = [f"--{kind}=." for kind in ("python_out", "pyi_out", "grpc_python_out")]
    command = [sys.executable, "-m", "grpc_tools.protoc", "-I.", *outputs, "cairn/serve/proto/indexer.proto"]
    subprocess.run(command, cwd=tmp_path, check=True, timeout=60)
    made = {path.name: path.read_text() for path in target.iterdir()}
    assert made == {name: (PROTO / name).read_text() for name in made}
    assert len(made) == 4
