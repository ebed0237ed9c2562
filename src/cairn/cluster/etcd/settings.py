"""How to reach etcd: addresses, secrets, times."""

import re
from pathlib import Path
from typing import Final, NamedTuple

import msgspec

from cairn.errors import InputError

_ADDRESS: Final = re.compile(r"(?:(https?)://)?(\[[0-9A-Fa-f:.%]+\]|[^\s:/\[\]@,]+):(\d{1,5})/?")


class Address(NamedTuple):
    """target: as gRPC takes it, `host:port`, the host a name or an IP address. tls: None: as the other settings say."""

    target: str
    tls: bool | None


class EtcdSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds. The password is in no repr.

    endpoints: `host:port`, `http://host:port` or `https://host:port`; members of one cluster, in any order. TLS is used
    for https, and for bare addresses if `ca` or `cert` is set. ca: PEM file of the authorities; None: the system's.
    cert, key: PEM files, where members ask for a client's certificate. timeout_s: deadline of a call, all attempts
    included. attempt_s: of one attempt.
    """

    endpoints: tuple[str, ...]
    username: str | None = None
    password: str | None = None
    ca: Path | None = None
    cert: Path | None = None
    key: Path | None = None
    timeout_s: float = 5.0
    attempt_s: float = 1.25

    def __repr__(self) -> str:
        return f"EtcdSettings(endpoints={self.endpoints})"

    def addresses(self) -> list[Address]:
        """The endpoints, each once. Raises InputError for one that is none."""
        if not self.endpoints:
            raise InputError("no endpoint of etcd is given; name at least one, as 127.0.0.1:2379")
        return list(dict.fromkeys(map(parse_address, self.endpoints)))

    def secure(self, address: Address) -> bool:
        """Whether TLS is used there."""
        return address.tls if address.tls is not None else bool(self.ca or self.cert)


def parse_address(text: str) -> Address:
    """Raises InputError for what is no address."""
    match = _ADDRESS.fullmatch(text.strip())
    if match is None or not 0 < int(match[3]) < 65536:
        raise InputError(f"{_masked(text)}: must be host:port, or http:// or https:// before it, as 127.0.0.1:2379")
    return Address(f"{match[2]}:{match[3]}", {None: None, "http": False, "https": True}[match[1]])


def _masked(text: str) -> str:
    """An address may hold a password by mistake (user:password@host)."""
    return repr(re.sub(r"[^/]*@", "***@", text))
