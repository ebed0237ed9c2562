"""A scorer for a scheduler: asks `cairn index` who holds a prompt, weighs that against load, tells the decision.

cairn index --instance a=tcp://10.0.0.1:5557 --instance b=tcp://10.0.0.2:5557 --model llama=/models/llama
python examples/fleet_scorer.py http://127.0.0.1:8600 "You are a helpful assistant. ..."     # text, tokenized there
python examples/fleet_scorer.py http://127.0.0.1:8600 --tokens 4096                          # made-up token ids

Nothing but the standard library, so that it can be copied into a scheduler. What the service does not answer in time is
no reason not to route: the least loaded instance is taken then.
"""

import argparse
import array
import http.client
import json
import os
import sys
from typing import Any
from urllib.parse import urlencode, urlsplit

TIMEOUT_S = 0.5


class Scorer:
    """One connection that stays open; for one thread. token: of the service, if it listens beyond loopback."""

    def __init__(self, url: str, token: str | None = None) -> None:
        self._connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=TIMEOUT_S)
        self._headers = {"Authorization": f"Bearer {token}"} if token else {}

    def pick(self, prompt: str | list[int], load: dict[str, float]) -> str:
        """The instance for a prompt. load: by instance, the tokens that wait there to be computed: what an instance
        holds of the prompt it need not compute, so both are counted in tokens.
        """
        try:
            scores = self._ask("/score", prompt, {"instances": list(load)})["scores"]
        except (OSError, http.client.HTTPException, ValueError) as error:
            print(f"not scored: {error}", file=sys.stderr)
            self._connection.close()
            return min(load, key=load.__getitem__)
        best = max(load, key=lambda name: scores.get(name, {"score": 0.0})["score"] - load[name])
        try:
            self._ask("/routed", prompt, {"instance": best})
        except (OSError, http.client.HTTPException, ValueError) as error:
            print(f"not told: {error}", file=sys.stderr)
            self._connection.close()
        return best

    def _ask(self, path: str, prompt: str | list[int], fields: dict[str, Any]) -> dict[str, Any]:
        if isinstance(prompt, str):
            body, kind = json.dumps({"prompt": prompt, **fields}).encode(), "application/json"
        else:  # bare token ids: the fastest way
            words = array.array("I", prompt)
            if sys.byteorder == "big":
                words.byteswap()
            path, body, kind = (
                f"{path}/tokens?{urlencode(fields, doseq=True)}",
                words.tobytes(),
                "application/octet-stream",
            )
        self._connection.request("POST", path, body, {**self._headers, "Content-Type": kind})
        answer = self._connection.getresponse()
        found: dict[str, Any] = json.loads(answer.read())
        if answer.status != 200:
            raise ValueError(found["error"]["message"])
        return found

    def instances(self) -> list[str]:
        self._connection.request("GET", "/instances", headers=self._headers)
        states = json.loads(self._connection.getresponse().read())["instances"]
        return sorted({state["name"] for state in states if state["connected"]})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("url")
    parser.add_argument("prompt", nargs="?")
    parser.add_argument("--tokens", type=int, help="so many token ids in place of a prompt")
    options = parser.parse_args()
    scorer = Scorer(options.url, os.environ.get("CAIRN_INDEX__TOKEN"))
    waiting = dict.fromkeys(scorer.instances(), 0.0)
    asked = options.prompt if options.prompt is not None else list(range(options.tokens or 1024))
    for turn in (1, 2):
        chosen = scorer.pick(asked, waiting)
        waiting[chosen] += 100.0  # what the request added, less what it found
        print(f"request {turn} goes to {chosen}")
