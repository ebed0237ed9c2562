"""A real headless Chromium, offline but for this host, and what it says of a page."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from selenium import webdriver

PAGE_S = 30


@contextmanager
def chromium(width: int = 1280, height: int = 1000, scale: float = 1.0) -> Iterator[webdriver.Chrome]:
    """Skips the test where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no `chromium` and `chromedriver` here: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for one in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars", "--disable-gpu"):
        options.add_argument(one)
    options.add_argument("--disable-background-networking")
    options.add_argument(f"--force-device-scale-factor={scale}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options, webdriver.ChromeService(driver))
    try:
        found.set_page_load_timeout(PAGE_S)
        found.set_script_timeout(PAGE_S)
        resize(found, width, height)
        yield found
    finally:
        found.quit()


def resize(browser: webdriver.Chrome, width: int, height: int) -> None:
    """Of the page itself: windows are not made narrower than 500 px."""
    size = {"width": width, "height": height, "deviceScaleFactor": 0, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)


def prefer(browser: webdriver.Chrome, scheme: str) -> None:
    """scheme: light or dark."""
    features = [
        {"name": "prefers-color-scheme", "value": scheme},
        {"name": "prefers-reduced-motion", "value": "reduce"},
    ]
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})


def requested(browser: webdriver.Chrome) -> list[str]:
    """URLs that were asked for since the last call."""
    entries: list[dict[str, Any]] = [json.loads(one["message"])["message"] for one in browser.get_log("performance")]
    sent = [one["params"] for one in entries if one["method"] == "Network.requestWillBeSent"]
    return [one["request"]["url"] for one in sent]


def complaints(browser: webdriver.Chrome) -> list[str]:
    """What the console has said since the last call, warnings included."""
    return [one["message"] for one in browser.get_log("browser") if one["level"] in ("SEVERE", "WARNING")]
