"""URLs that may hold a password."""

from urllib.parse import urlsplit


def mask_url(url: str) -> str:
    """A URL without its password, for people and logs."""
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition(":")[0] + "://***"
    if "@" not in parts.netloc or parts.password is None:
        return url
    return parts._replace(netloc=f"{parts.username or ''}:***@{parts.netloc.rpartition('@')[2]}").geturl()
