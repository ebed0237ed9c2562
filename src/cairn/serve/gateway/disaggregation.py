"""Prefill on one engine, decode on another: the KV goes through the tiers that both share.

The prefill engine gets the request with one token to make; its connector stores the prompt's KV. The decode engine gets
it whole, finds the KV and begins with the last token. Whatever goes wrong with the first costs only time: the second
computes what it does not find. `kv_transfer_params` go from one to the other as vLLM's own connectors expect it.
"""

import logging
import time
from typing import TYPE_CHECKING, Any, Final

import msgspec

from cairn.observe.log import log_once
from cairn.observe.trace import begin, onward
from cairn.serve.gateway.asked import Asked, edited
from cairn.serve.gateway.base import Headers, Prompt, UpstreamError
from cairn.serve.gateway.members import Flight, Member

if TYPE_CHECKING:
    from cairn.serve.gateway.relay import Relay

logger = logging.getLogger(__name__)

#: Bytes of an answer with one token.
_ANSWER: Final = 8 << 20
_REMOTE_DECODE: Final = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class _Reply(msgspec.Struct):
    kv_transfer_params: dict[str, Any] | None = None


async def prefilled(
    relay: "Relay", asked: Asked, member: Member, prompt: Prompt, headers: Headers, body: bytes
) -> bytes:
    """The body for the decode engine, once the prefill engine has computed the prompt, or has failed to."""
    changes: dict[str, Any] = {"stream": False, "stream_options": None, "kv_transfer_params": _REMOTE_DECODE}
    changes |= {"min_tokens": None, "max_tokens": 1}
    if b'"max_completion_tokens"' in body:
        changes["max_completion_tokens"] = 1
    question, patience_s = edited(body, changes), relay.config.first_token_s
    try:
        with begin("cairn.prefill", instance=member.name), Flight(relay.members, member, prompt) as flight:
            relay.prompts.sent(prompt, member.name)
            answer = await member.pool.post(asked.path.encode(), onward(headers), question, patience_s)
            try:
                told = bytearray()
                while data := await answer.read(patience_s):
                    told += data
                    if len(told) > _ANSWER:
                        raise UpstreamError("protocol", "too long an answer to a prefill")
            finally:
                answer.close()
            if answer.status != 200:
                raise UpstreamError("status", f"answered {answer.status}")
            flight.first_token()
            params = msgspec.json.decode(bytes(told), type=_Reply).kv_transfer_params
        member.succeeded()
    except (UpstreamError, ValueError, RecursionError) as error:
        reason = error.reason if isinstance(error, UpstreamError) else "protocol"
        log_once(logger, f"prefill {member.name} {reason}", f"{member.name} has not computed a prompt: {error}")
        relay.metrics.failed(member.name, reason)
        if reason != "status":
            member.failed(time.monotonic())
        return body
    relay.metrics.handed_over.add()
    return edited(body, {"kv_transfer_params": params}) if params else body
