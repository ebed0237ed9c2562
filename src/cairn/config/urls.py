"""URLs that may hold a password."""

import re
from typing import Final
from urllib.parse import urlsplit

#: Up to the last @, since whoever writes a password as it is (S3's keys have slashes) means all of it, though a URL's
#: host would end before. An option may stand before the URL, as on a command line.
_SECRET: Final = re.compile(r"((?:-*[\w.-]+=)?[A-Za-z][A-Za-z0-9+.-]*://[^:/?#@]*):.*@", re.DOTALL)


def mask_url(url: str) -> str:
    """A URL without its password, for people and logs."""
    masked = _SECRET.sub(r"\1:***@", url, count=1)
    try:
        urlsplit(masked)
    except ValueError:
        return url.partition(":")[0] + "://***"
    return masked
