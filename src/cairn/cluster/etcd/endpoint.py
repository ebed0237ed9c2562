"""One member of etcd: its channel, and the calls that Cairn uses."""

import asyncio
from typing import Any, Final

import grpc
import grpc.aio

from cairn.cluster.etcd import wire_pb2 as wire
from cairn.cluster.etcd.settings import Address, EtcdSettings
from cairn.errors import InputError

#: Bytes of a message that is taken in. A page of a listing holds 200 values of 256 KiB at most.
MAX_MESSAGE: Final = 64 << 20

#: No proxy, no connection shared with other users of gRPC, no repetition that we do not know of, and a member that is
#: back is found within a second.
_OPTIONS: Final = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.enable_retries", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
)

#: gRPC's metadata of a call.
Headers = tuple[tuple[str, str], ...]


class Endpoint:
    """A member by its address. The channel connects when it is used."""

    def __init__(self, address: Address, credentials: grpc.ChannelCredentials | None) -> None:
        self.target = address.target
        if credentials:
            self._channel = grpc.aio.secure_channel(address.target, credentials, options=_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(address.target, options=_OPTIONS)
        self.range = self._unary("KV/Range", wire.RangeResponse)
        self.put = self._unary("KV/Put", wire.PutResponse)
        self.delete = self._unary("KV/DeleteRange", wire.DeleteRangeResponse)
        self.transact = self._unary("KV/Txn", wire.TxnResponse)
        self.grant = self._unary("Lease/LeaseGrant", wire.LeaseGrantResponse)
        self.revoke = self._unary("Lease/LeaseRevoke", wire.LeaseRevokeResponse)
        self.authenticate = self._unary("Auth/Authenticate", wire.AuthenticateResponse)
        self.status = self._unary("Maintenance/Status", wire.StatusResponse)
        self.watch = self._stream("Watch/Watch", wire.WatchResponse)
        self._keep_alive = self._stream("Lease/LeaseKeepAlive", wire.LeaseKeepAliveResponse)
        self._renewals: set[asyncio.Task[Any]] = set()

    async def keep_alive(self, request: wire.LeaseKeepAliveRequest, *, timeout: float, metadata: Headers) -> Any:
        """One renewal, as if it were no stream."""
        renewal = asyncio.ensure_future(self._renew(request, timeout, metadata))
        self._renewals.add(renewal)
        renewal.add_done_callback(self._renewals.discard)
        return await renewal

    async def close(self) -> None:
        """Ends all calls."""
        for renewal in self._renewals:
            renewal.cancel()  # gRPC leaves a stream that has not begun waiting for ever
        await self._channel.close(grace=None)

    async def _renew(self, request: wire.LeaseKeepAliveRequest, timeout: float, metadata: Headers) -> Any:
        call = self._keep_alive(timeout=timeout, metadata=metadata)
        try:
            await call.write(request)
            await call.done_writing()
            answer = await call.read()
            if answer is grpc.aio.EOF:
                raise await _error(call)
            while await call.read() is not grpc.aio.EOF:
                pass  # the member's end follows ours
            return answer
        except asyncio.InvalidStateError:  # what gRPC says of a stream that is over
            raise await _error(call) from None
        finally:
            call.cancel()

    def _unary(self, method: str, answer: Any) -> Any:
        path = f"/etcdserverpb.{method}"
        return self._channel.unary_unary(path, _serialize, answer.FromString)

    def _stream(self, method: str, answer: Any) -> Any:
        path = f"/etcdserverpb.{method}"
        return self._channel.stream_stream(path, _serialize, answer.FromString)


def make_credentials(settings: EtcdSettings) -> grpc.ChannelCredentials:
    """TLS from the settings' files. Raises InputError for one that cannot be read, or a certificate without its key."""
    if bool(settings.cert) != bool(settings.key):
        raise InputError("a client's certificate needs both files; set cert and key")
    parts: list[bytes | None] = []
    for path in (settings.ca, settings.key, settings.cert):
        try:
            parts.append(path.read_bytes() if path else None)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}; name a PEM file") from None
    return grpc.ssl_channel_credentials(*parts)


def _serialize(message: Any) -> bytes:
    data: bytes = message.SerializeToString()
    return data


async def _error(call: Any) -> grpc.aio.AioRpcError:
    """How a stream ended, as other calls end."""
    return grpc.aio.AioRpcError(await call.code(), grpc.aio.Metadata(), grpc.aio.Metadata(), await call.details())
