"""Who may ask: everybody on this host where a process listens on loopback, elsewhere whoever has its token."""

import hmac
import ipaddress

from cairn.errors import ConfigError


def check_exposure(host: str, token: str | None, given: str = "CAIRN_INDEX__TOKEN, or --token-file") -> None:
    """Raises ConfigError for a service that others than this host could ask without a token. given: how it is told."""
    if token is None and not is_loopback(host):
        raise ConfigError(f"host={host}: is not loopback, so a token is needed: {given}; or listen on 127.0.0.1")
    if token is not None and (not token.isascii() or not token.strip() or token != token.strip()):
        raise ConfigError("token: must be ASCII text without blanks around it")


def is_loopback(host: str) -> bool:
    """Whether a name or an address is this host's alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def may_pass(authorization: str | bytes | None, token: str | None) -> bool:
    """Whether an Authorization header carries the token. Takes the same time wherever they differ."""
    if token is None:
        return True
    given = authorization.encode("utf-8", "replace") if isinstance(authorization, str) else authorization or b""
    scheme, _, secret = given.partition(b" ")
    return hmac.compare_digest(secret.strip(), token.encode()) and scheme.lower() == b"bearer"
