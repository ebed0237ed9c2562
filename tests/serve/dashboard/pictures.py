"""Pictures of the dashboard of a cluster that is running: `python -m tests.serve.dashboard.pictures URL DIRECTORY`."""

import sys
import time
from pathlib import Path
from typing import Any

from tests.serve.dashboard.browser import chromium, prefer, resize

#: Name, width in pixels, colours.
_PICTURES = (("light", 1280, "light"), ("dark", 1280, "dark"), ("360", 360, "light"))
_ALL = "return document.documentElement.scrollHeight"


def take(url: str, directory: Path) -> None:
    """Of the whole page each."""
    with chromium() as browser:
        browser.get(url)
        for name, width, scheme in _PICTURES:
            prefer(browser, scheme)
            resize(browser, width, 900)
            time.sleep(3)
            resize(browser, width, int(browser.execute_script(_ALL)))  # type: ignore[no-untyped-call]
            time.sleep(1)
            picture: Any = browser.get_screenshot_as_png()
            (directory / f"dashboard-{name}.png").write_bytes(picture)


if __name__ == "__main__":
    take(sys.argv[1], Path(sys.argv[2]))
