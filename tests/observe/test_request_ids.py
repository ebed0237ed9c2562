"""A request has one id: the client's or the service's, in the answer, at the engine, and in the service's log."""

import json

from tests.serve.gateway.running import Engine, Gateway
from tests.serve.running import until


def test_an_id_goes_everywhere() -> None:
    body = {"model": "mock", "prompt": "a", "max_tokens": 1}
    json_lines = {"CAIRN_OBSERVE__LOG_FORMAT": "json", "CAIRN_SERVE__LOG_LEVEL": "info"}
    with Engine() as engine, Gateway("--backend", f"e={engine.url}", **json_lines) as gateway:
        until(lambda: gateway.client.get("/health/ready").status_code == 200, "the engine is known")
        answers = [
            gateway.client.post("/v1/completions", json=body, headers={"x-request-id": given} if given else {})
            for given in ("mine", "", "", "not readable", "x" * 200)
        ]
        ids = [answer.headers["x-request-id"] for answer in answers]
        told = [one["headers"]["x-request-id"] for one in engine.seen()["requests"]]
        refused = gateway.client.post("/v1/completions", content=b"{")
        gateway.end()
        assert gateway.process.stdout is not None
        lines = [json.loads(line) for line in gateway.process.stdout.read().splitlines() if line.startswith("{")]
    assert ids[0] == "mine"
    assert len({*ids}) == 5
    assert all(one.isascii() and len(one) < 40 for one in ids)
    assert told == ids
    by_id = {line["request_id"]: line for line in lines if line.get("path") == "/v1/completions"}
    assert {*ids} < by_id.keys()
    assert (by_id["mine"]["level"], by_id["mine"]["status"]) == ("INFO", 200)
    assert by_id["mine"]["seconds"] > 0
    assert by_id[refused.headers["x-request-id"]]["status"] == 400
